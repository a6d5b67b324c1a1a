"""Searches run in their requests' order, and what nobody waits for is not begun."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loopsway.indexer import open_index
from loopsway.indexer.search.sharded import LocalShards, Method, ShardedReader
from loopsway.service import Engine
from loopsway.service.search_threads import SearchThreads


@pytest.fixture
async def threads() -> AsyncIterator[SearchThreads]:
    """One thread."""
    made = SearchThreads(1, "test")
    yield made
    await asyncio.to_thread(made.close)


async def test_the_request_that_came_first_goes_first_whenever_it_gets_here(threads: SearchThreads) -> None:
    release, done = threading.Event(), list[int]()

    def noting(order: int) -> Callable[[object], None]:
        return lambda _: done.append(order)

    held = asyncio.create_task(threads.run(lambda _: release.wait(30), order=1))
    await asyncio.sleep(0)
    assert not threads.has_free
    others = [asyncio.create_task(threads.run(noting(order), order=order)) for order in (5, 3, 4, 2)]
    await asyncio.sleep(0.01)
    release.set()
    await asyncio.gather(held, *others)
    assert done == [2, 3, 4, 5]
    assert threads.has_free


async def test_what_is_cancelled_while_it_waits_is_never_begun(threads: SearchThreads) -> None:
    release, begun = threading.Event(), list[str]()
    held = asyncio.create_task(threads.run(lambda _: release.wait(30)))
    await asyncio.sleep(0)
    dropped = asyncio.create_task(threads.run(lambda _: begun.append("dropped"), order=2))
    kept = asyncio.create_task(threads.run(lambda _: begun.append("kept"), order=3))
    await asyncio.sleep(0.01)
    dropped.cancel()
    release.set()
    await asyncio.gather(held, kept)
    assert begun == ["kept"]
    assert threads.has_free


async def test_a_turn_that_comes_as_its_request_goes_is_passed_on(threads: SearchThreads) -> None:
    release = threading.Event()
    held = asyncio.create_task(threads.run(lambda _: release.wait(30)))
    await asyncio.sleep(0)
    dropped = asyncio.create_task(threads.run(lambda _: None, order=2))
    kept = asyncio.create_task(threads.run(lambda _: "kept", order=3))
    await asyncio.sleep(0.01)
    held.add_done_callback(lambda _: dropped.cancel())  # in the round of the loop in which it was given the turn
    release.set()
    await held
    assert await asyncio.wait_for(kept, 30) == "kept"
    assert dropped.cancelled() or dropped.done()
    assert threads.has_free


async def test_cancelled_work_ends_at_its_next_part(threads: SearchThreads) -> None:
    begun, ended = threading.Event(), threading.Event()

    def work(go_on: Callable[[], None]) -> None:
        begun.set()
        try:
            while True:
                go_on()
                time.sleep(0.001)
        finally:
            ended.set()

    task = asyncio.create_task(threads.run(work))
    assert await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    assert await asyncio.to_thread(ended.wait, 30)


async def test_a_cancelled_comparison_of_examples_ends_at_its_next_part(index_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()

    class Endless(LocalShards):
        def ask(self, method: Method, arguments: Sequence[Any], **options: Any) -> list[Any]:
            begun.set()
            try:
                while True:
                    options["go_on"]()
                    time.sleep(0.001)
            finally:
                ended.set()

    engine = Engine(open_index(index_path))
    engine.index.reader = ShardedReader(Endless([engine.index.codes]))
    asking = engine.neighbors(["tiny-3"], k=3, by="cosine", step=None, threshold=None, where=None)
    task = asyncio.create_task(asking)
    assert await asyncio.to_thread(begun.wait, 30)
    task.cancel()
    assert await asyncio.to_thread(ended.wait, 30)
    await asyncio.to_thread(engine.close)


async def test_what_is_around_work_is_entered_once_it_has_its_thread(threads: SearchThreads) -> None:
    taken = list[float]()

    @contextmanager
    def timed() -> Iterator[None]:
        begin = time.perf_counter()
        yield
        taken.append(time.perf_counter() - begin)

    await asyncio.gather(*(threads.run(lambda _: time.sleep(0.1), around=timed()) for _ in range(3)))
    assert len(taken) == 3
    assert min(taken) >= 0.1
    assert sum(taken) < 0.6, "the second waited 0.1 s for its thread, the third 0.2"
