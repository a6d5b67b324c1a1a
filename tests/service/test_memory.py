"""What a server holds of a request goes with it, however many it refuses; and what is freed goes back to the system.

While requests come, what is counted is the memory in use: what is freed goes back by and by.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loopsway.client import ExampleQuery
from loopsway.client.load import Load, load_request
from serving import QUERIES, Served, wait_for

from .watched_server import used_bytes

REQUEST_BYTES, CALLERS, UNREAD, MIB = 256 << 10, 12, 400, 1 << 20
FREED_BYTES = 512 << 20  # more than a server, or its model process, takes
HELD_S = 4.0

needs_glibc = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33, which tells what is in use"
)


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()[0]) << 10


@needs_glibc
async def test_memory_in_use_is_bounded_under_more_load_than_is_let_in(
    serve: Callable[..., Served], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR", "loopsway.access")  # pytest keeps what is logged
    served = serve(max_waiting=4)
    pid = served.server.catalog.worker.pid
    assert pid is not None
    requests = [load_request(ExampleQuery(query | {"text": "x" * REQUEST_BYTES}), k=3) for query in QUERIES]
    async with Load(served.target, timeout_s=60) as load:
        await load.closed({"example": requests}, CALLERS, seconds=1)
        # Of this process, which is the server's and the callers'.
        before, model_before = used_bytes(), anonymous_bytes(pid)
        measured = await load.closed({"example": requests}, CALLERS, seconds=2)
        after, model_after = used_bytes(), anonymous_bytes(pid)
    assert set(measured.codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert measured.num_calls * REQUEST_BYTES > 32 * MIB, "too few calls to tell"
    assert after - before < 8 * MIB
    assert model_after - model_before < 32 * MIB


@contextmanager
def child(index: Path, folder: Path, freed_bytes: int = 0) -> Iterator[tuple[int, str]]:
    """A server in a process of its own, as memory_server.py says: its process id and its address."""
    ready, log = folder / "ready.json", folder / "log"
    command = [
        sys.executable,
        Path(__file__).with_name("memory_server.py"),
        index,
        ready,
        str(freed_bytes),
        str(HELD_S),
    ]
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            wait_for(lambda: ready.exists() or server.poll() is not None, 90)
            assert ready.exists(), log.read_text()
            yield server.pid, f"127.0.0.1:{json.loads(ready.read_text())['port']}"
        finally:
            server.terminate()
            server.wait(60)


@needs_glibc
def test_freed_memory_goes_back_in_the_server_and_in_its_model_process(index_path: Path, tmp_path: Path) -> None:
    with child(index_path, tmp_path, FREED_BYTES) as (pid, _):
        (model,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        wait_for(lambda: max(anonymous_bytes(pid), anonymous_bytes(model)) < FREED_BYTES, 60)


async def test_requests_that_are_not_read_yet_take_little_memory_whatever_their_size(
    index_path: Path, tmp_path: Path
) -> None:
    requests = [load_request(ExampleQuery(query | {"text": "x" * REQUEST_BYTES}), k=3) for query in QUERIES]
    with child(index_path, tmp_path) as (pid, target):
        async with Load(target, timeout_s=60) as load:
            await load.closed({"example": requests}, 64, seconds=1)  # gRPC sees how fast the connection is
            before = anonymous_bytes(pid)
            os.kill(pid, signal.SIGUSR1)
            asking = asyncio.create_task(load.closed({"example": requests}, UNREAD, seconds=1))
            await asyncio.sleep(HELD_S - 1)
            growth = anonymous_bytes(pid) - before
            measured = await asking
    assert set(measured.codes) <= {"OK", "RESOURCE_EXHAUSTED"}
    assert growth < UNREAD * REQUEST_BYTES / 2
