"""Streams of requests: how many may be open at once, and how long one may let the server wait.

A stream that is cut, or whose client does nothing, leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import NoReturn, TypeVar

from .errors import QueueFullError, StalledError, UnavailableError
from .settings import Settings
from .tokens import CALLER

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class StreamPlaces:
    """The streams that a server has open. Use it within one event loop.

    Where there are tokens, one may have half of the places, so that it never keeps all others out.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._open = Counter[str]()  # by the names of tokens; "" without
        self._ending = asyncio.Event()

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one more.

        Raises:
            QueueFullError: there is none.
        """
        caller, most = CALLER.get(), self._settings.max_streams
        name = "" if caller is None else caller.token.name
        if self._open.total() >= most:
            self._refuse(f"the server has {most} streams open, as many as it admits")
        if name and self._open[name] >= max(1, most // 2):
            self._refuse(f"token {name} has {self._open[name]} streams open, as many as one token may have")
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1

    def end(self) -> None:
        """The server ends: nothing more is read of streams."""
        self._ending.set()

    async def until_end(self, items: AsyncIterator[_Item]) -> AsyncIterator[_Item]:
        """The same items, as long as the server goes on.

        Raises:
            UnavailableError: it ends.
        """
        end = asyncio.create_task(self._ending.wait())
        reading: asyncio.Future[_Item | None] | None = None
        try:
            while not self._ending.is_set():
                reading = asyncio.ensure_future(anext(items, None))
                await asyncio.wait((reading, end), return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    if (item := reading.result()) is None:
                        return
                    yield item
        finally:
            for each in (reading, end):
                if each is not None:
                    each.cancel()
        raise UnavailableError(
            "the server ends, and reads no more of this stream; what it had read is answered",
            retry_after_s=self._settings.retry_after_s,
        )

    def _refuse(self, text: str) -> NoReturn:
        raise QueueFullError(text, retry_after_s=self._settings.retry_after_s)


async def in_order(
    requests: AsyncIterator[_Item], answer: Callable[[_Item], Awaitable[_Answer]], most: int
) -> AsyncGenerator[_Answer, None]:
    """The answer to each request, in their order. Requests are read while fewer than `most` are not yet taken."""
    places = asyncio.Semaphore(most)
    begun: asyncio.Queue[asyncio.Future[_Answer] | None] = asyncio.Queue()

    async def read() -> None:
        try:
            while True:
                await places.acquire()
                request = await anext(requests, None)
                if request is None:
                    return
                begun.put_nowait(asyncio.ensure_future(answer(request)))
        finally:
            begun.put_nowait(None)

    reader = asyncio.create_task(read())
    current: asyncio.Future[_Answer] | None = None
    try:
        while (current := await begun.get()) is not None:
            yield await current
            places.release()
        await reader  # for what it raised
    finally:
        for each in (reader, current, *(begun.get_nowait() for _ in range(begun.qsize()))):
            if each is not None:
                each.cancel()


@asynccontextmanager
async def taken_in(stall_s: float) -> AsyncIterator[None]:
    """Bounds how long the client may take to take a message.

    Raises:
        StalledError: it did not in time.
    """
    try:
        async with asyncio.timeout(stall_s):
            yield
    except TimeoutError as error:
        raise StalledError(f"the stream's answers were not taken within {stall_s:g} s") from error


async def unstalled(items: AsyncIterator[_Item], stall_s: float) -> AsyncIterator[_Item]:
    """The same items.

    Raises:
        StalledError: the next one did not come in time.
    """
    while True:
        try:
            async with asyncio.timeout(stall_s):
                item = await anext(items)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise StalledError(f"the stream's next message did not come within {stall_s:g} s") from error
        yield item
