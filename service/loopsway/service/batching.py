"""Dynamic batching: what several requests ask for at once is done together, and each gets its own result or error."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Batcher(Generic[_Item, _Result]):
    """Collects items while a batch is under way, and for `delay_s` beyond. Use it within one event loop.

    Args:
        work: does a batch; whatever it raises for several items is found out item by item.
        batch_size: items in a batch, at the most.
        shared_faults: what is no single item's fault when the work raises it: all items of the batch get it.
        delay_s: how long the first item waits for others while no batch is under way; with 0 a batch holds what came
            while the one before it was done, and a lone item never waits.
    """

    def __init__(
        self,
        work: Callable[[Sequence[_Item]], Coroutine[Any, Any, Sequence[_Result]]],
        *,
        batch_size: int,
        delay_s: float = 0.0,
        shared_faults: type[Exception] | tuple[type[Exception], ...] = (),
    ) -> None:
        self._shared_faults = shared_faults
        self._work, self._batch_size, self._delay_s = work, batch_size, delay_s
        self._waiting: deque[tuple[_Item, asyncio.Future[_Result]]] = deque()
        self._worker: asyncio.Task[None] | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    async def run(self, items: Sequence[_Item]) -> list[_Result | BaseException]:
        """The result of each item, or what it raised. Cancelled, the items that have not begun are dropped."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[_Result]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        if self._worker is None or self._worker.done():
            self._worker = loop.create_task(self._serve())
        results = await asyncio.gather(*futures, return_exceptions=True)  # whose cancellation cancels the futures
        if any(isinstance(result, asyncio.CancelledError) for result in results):
            raise asyncio.CancelledError("the server ends")
        return [result for result in results if not isinstance(result, asyncio.CancelledError)]

    async def _serve(self) -> None:
        """Does batch after batch until nothing waits."""
        while self._waiting:
            if self._delay_s and len(self._waiting) < self._batch_size:
                await asyncio.sleep(self._delay_s)
            await self._do(self._next())

    def _next(self) -> list[tuple[_Item, asyncio.Future[_Result]]]:
        """The items that have waited longest and that somebody still waits for."""
        batch: list[tuple[_Item, asyncio.Future[_Result]]] = []
        while self._waiting and len(batch) < self._batch_size:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    async def _do(self, batch: Sequence[tuple[_Item, asyncio.Future[_Result]]]) -> None:
        batch = [(item, future) for item, future in batch if not future.done()]
        if not batch:
            return
        try:
            results = await self._while_wanted([item for item, _ in batch], [future for _, future in batch])
        except asyncio.CancelledError:
            for _, future in (*batch, *self._waiting):
                future.cancel()
            raise
        except Exception as error:
            if len(batch) > 1 and not isinstance(error, self._shared_faults):  # one item's fault is not the others'
                for each in batch:
                    await self._do([each])
                return
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results or [], strict=results is not None):
            if not future.done():
                future.set_result(result)

    async def _while_wanted(
        self, items: Sequence[_Item], futures: Sequence[asyncio.Future[_Result]]
    ) -> Sequence[_Result] | None:
        """Does the work; None when it was cancelled because nobody waited for any of its results any more."""
        work = asyncio.ensure_future(self._work(items))
        is_unwanted = False

        def note(_: asyncio.Future[_Result]) -> None:
            nonlocal is_unwanted
            if all(future.done() for future in futures) and not work.done():
                is_unwanted = True
                work.cancel()

        for future in futures:
            future.add_done_callback(note)
        try:
            return await work
        except asyncio.CancelledError:
            if is_unwanted:
                return None
            work.cancel()
            raise
