"""Streams of requests: how many may be open at once, and how long one may let the server wait.

A stream that is cut, or whose client does nothing, leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import TypeVar

from .errors import QueueFullError, StalledError
from .settings import Settings

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


class StreamPlaces:
    """The streams that a server has open. Use it within one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.num_open = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one more.

        Raises:
            QueueFullError: there is none.
        """
        if self.num_open >= self._settings.max_streams:
            raise QueueFullError(
                f"the server has {self.num_open} streams open, as many as it admits",
                retry_after_s=self._settings.retry_after_s,
            )
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1


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
