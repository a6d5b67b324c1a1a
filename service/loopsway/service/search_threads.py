"""The threads that searches run in. Requests that came first go first, and what nobody waits for is not begun."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from contextvars import copy_context
from heapq import heappop, heappush
from itertools import count
from typing import TypeAlias, TypeVar

from .record import part

_Result = TypeVar("_Result")
GoOn: TypeAlias = Callable[[], None]
Work: TypeAlias = Callable[[GoOn], _Result]

FIRST = 0  # before all requests that wait


class SearchThreads:
    """Runs work in threads. Use it within one event loop, and close it.

    Args:
        num_threads: work that runs at once.
        name: of the threads.
    """

    def __init__(self, num_threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix=name)
        self._num_free, self._ties = num_threads, count()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap

    @property
    def has_free(self) -> bool:
        """Whether one has nothing to do."""
        return self._num_free > 0

    async def run(
        self, work: Work[_Result], *, order: int = FIRST, around: AbstractContextManager[None] | None = None
    ) -> _Result:
        """Runs `work`, which calls what it is given between its costly parts: it ends there once it is cancelled.

        Args:
            work: what to do.
            order: what waits with a lower one goes first.
            around: entered while it has a thread.
        """
        is_cancelled = threading.Event()

        def go_on() -> None:
            if is_cancelled.is_set():
                raise asyncio.CancelledError("nobody waits for this any more")

        with part("queue") as passage:  # for a thread

            def begun() -> _Result:
                passage.becomes("search")
                return work(go_on)

            async with self._turn(order):
                try:
                    with around or nullcontext():
                        within = copy_context()  # the request's, for what is noted of it
                        return await asyncio.get_running_loop().run_in_executor(self._threads, within.run, begun)
                except asyncio.CancelledError:
                    is_cancelled.set()
                    raise

    def close(self) -> None:
        """Waits for what runs; drops what waits."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    @asynccontextmanager
    async def _turn(self, order: int) -> AsyncIterator[None]:
        """One of the threads, when it is this one's turn."""
        if self._num_free:
            self._num_free -= 1
        else:
            turn = asyncio.get_running_loop().create_future()
            heappush(self._waiting, (order, next(self._ties), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it had just been given the thread
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            *_, turn = heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1
