"""What a server holds of a request goes with it, however many it refuses.

What is counted is the memory in use, not what the C library keeps of freed memory for later, which is more under load,
and stays: by the minute it goes up and down by some 50 MiB.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest

from loopsway.client import ExampleQuery
from loopsway.client.load import Load, load_request
from serving import QUERIES, Served

from .watched_server import used_bytes

REQUEST_BYTES, CALLERS, MIB = 256 << 10, 12, 1 << 20


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file backs."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()[0]) << 10


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33, which tells what is in use")
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
