"""Real servers of a small index, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from loopsway.indexer import ExampleSketcher, SketchConfig, load_task, open_index
from loopsway.service import Engine, Settings, create_server
from loopsway.service.model import QueryModel
from loopsway.v1.attribution_pb2_grpc import AttributionStub

TASK_FILE = Path(__file__).with_name("service") / "tiny_task.py"
TASK_SPEC = f"{TASK_FILE}:TinyTask"
CONFIG = SketchConfig(width=256, bits=8)
QUERIES: list[dict[str, Any]] = [
    {"tokens": [0, 1, 2, 3, 4, 5]},
    {"tokens": [6, 5, 4, 3, 2, 1]},
    {"tokens": [1, 1, 1, 1, 1, 1]},
    {"tokens": [0, 6, 0, 6, 0, 6]},
]


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that runs in a thread of this process, with one index."""

    target: str
    stub: AttributionStub
    channel: grpc.Channel
    engine: Engine
    task: Any


@contextmanager
def running(engines: list[Engine], settings: Settings) -> Iterator[int]:
    """Runs a server in a thread with an event loop of its own; gives its port once it is SERVING."""
    started: Future[int] = Future()
    loop, stopping = asyncio.new_event_loop(), asyncio.Event()

    async def run() -> None:
        server, port = create_server(engines, settings)
        await server.start()
        started.set_result(port)
        await stopping.wait()
        await server.stop()

    def run_in_thread() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            try:
                runner.run(run())
            except BaseException as error:
                if started.done():
                    raise
                started.set_exception(error)

    thread = threading.Thread(target=run_in_thread)
    thread.start()
    try:
        yield started.result(60)
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(stopping.set)
        thread.join(60)
        assert not thread.is_alive()


def new_engine(path: Path, settings: Settings, *, model: bool = True, task_spec: str = TASK_SPEC) -> tuple[Engine, Any]:
    """An engine and its task, that the test can hold at the gate."""
    index, task = open_index(path), load_task(task_spec)
    if not model:
        return Engine(index, settings=settings), task
    sketcher = ExampleSketcher(task, index.config)
    model_of = QueryModel(task, sketcher, index, batch_size=8, batch_delay_s=settings.batch_delay_s)
    return Engine(index, model_of, settings=settings), task
