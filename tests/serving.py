"""Real servers of a small index, in a thread of the test's own process or in one of their own."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from loopsway.client import Client
from loopsway.indexer import SketchConfig
from loopsway.service import Engine, IndexSettings, Server, Settings, create_server
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


@dataclass(frozen=True)
class Gate:
    """Where the model of a server, in its own process, is held, and its calls are counted."""

    folder: Path

    @property
    def num_calls(self) -> int:
        """One for each batch at each checkpoint."""
        return self._counted("calls")

    @property
    def num_loads(self) -> int:
        """One for each time that a checkpoint was loaded."""
        return self._counted("loads")

    def _counted(self, name: str) -> int:
        file = self.folder / name
        return file.stat().st_size if file.exists() else 0

    def hold(self) -> None:
        """Holds the model from its next call on."""
        (self.folder / "held").touch()
        (self.folder / "entered").unlink(missing_ok=True)

    def wait_until_entered(self) -> None:
        wait_for((self.folder / "entered").exists)

    def open(self) -> None:
        (self.folder / "held").unlink(missing_ok=True)

    def hold_loading(self) -> None:
        """Holds the model when its next checkpoint is loaded."""
        (self.folder / "loading_held").touch()

    def open_loading(self) -> None:
        (self.folder / "loading_held").unlink(missing_ok=True)

    def break_device(self) -> None:
        """The next call of the model fails as after a failed assertion on a GPU."""
        (self.folder / "broken").touch()

    def hide_weights(self) -> None:
        """A checkpoint can't be loaded, as where its file system is not there for a while."""
        (self.folder / "hidden").touch()

    def show_weights(self) -> None:
        (self.folder / "hidden").unlink()

    def suffice_for(self, largest: int) -> None:
        """Memory suffices for batches of so many examples, and no more."""
        (self.folder / "largest").write_text(str(largest))


@dataclass(frozen=True, kw_only=True)
class Served:
    """A server that runs in a thread of this process, with one index."""

    target: str
    stub: AttributionStub
    channel: grpc.Channel
    server: Server
    gate: Gate

    @property
    def engine(self) -> Engine:
        return next(iter(self.server.catalog.values()))


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_alike(answers: list[Any], expected: list[Any]) -> None:
    """To rounding: another batch adds in another order."""
    for answer, alone in zip(answers, expected, strict=True):
        for mine, other in zip(answer.results, alone.results, strict=True):
            for found, ranking in zip([mine.total, *mine.steps], [other.total, *other.steps], strict=True):
                for side in ("proponents", "opponents"):
                    got, want = getattr(found, side), getattr(ranking, side)
                    assert [each.example_id for each in got] == [each.example_id for each in want]
                    for one, same in zip(got, want, strict=True):
                        assert one.influence == pytest.approx(same.influence, rel=1e-4)
                        assert one.standard_error == pytest.approx(same.standard_error, rel=1e-4)


@contextmanager
def running(settings: Settings, tracer_provider: Any = None) -> Iterator[tuple[Server, int]]:
    """Runs a server in a thread with an event loop of its own; gives it and its port once it is SERVING."""
    started: Future[tuple[Server, int]] = Future()
    loop, stopping = asyncio.new_event_loop(), asyncio.Event()

    async def run() -> None:
        server, port = create_server(settings, tracer_provider=tracer_provider)
        try:
            await server.start()
            started.set_result((server, port))
            await stopping.wait()
        finally:
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


@contextmanager
def commanded(config: Path) -> Iterator[tuple[subprocess.Popen[bytes], Client]]:
    """`loopsway serve` with a settings file, and a client of it."""
    ready, log = config.with_name("ready.json"), config.with_name("log")
    command = [
        sys.executable,
        "-W",
        "error",
        "-m",
        "loopsway.cli",
        "serve",
        "--config",
        str(config),
        "--ready-file",
        str(ready),
    ]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as child:
        try:
            wait_for(lambda: ready.exists() or child.poll() is not None, 90)
            assert child.poll() is None, log.read_text()
            with Client(f"127.0.0.1:{json.loads(ready.read_text())['port']}") as client:
                yield child, client
        finally:
            child.terminate()
            assert child.wait(60) == 0, log.read_text()


def asked_for(path: Path, gate: Gate | None = None, task: str = TASK_SPEC) -> IndexSettings:
    """How the small index is served, with its model, which can be held at the gate."""
    return IndexSettings(path=str(path), task=task, task_arguments=None if gate is None else {"gate": str(gate.folder)})


def without_model(path: Path) -> IndexSettings:
    return IndexSettings(path=str(path), model=False)
