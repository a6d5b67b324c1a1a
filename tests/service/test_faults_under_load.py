"""Faults while many ask: every call that was sent has its status, and the counts of each are what was promised."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from loopsway.client import AsyncClient, Client, ExampleQuery, IdQuery, InfluenceResult, SketchQuery, UnavailableError
from loopsway.client.load import OK, Load, Measurement, Requests, load_request
from loopsway.indexer import Index
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from serving import QUERIES, TASK_SPEC, Gate, Served, commanded, wait_for

EXAMPLES: Requests = {
    "example": [load_request(ExampleQuery(query), k=3) for query in QUERIES],
    "id": [load_request(IdQuery("tiny-7"), k=3)],
}
CALLERS, FOR_SKETCHES, RECONNECTS = 6, 2, 1000


@pytest.fixture
def searches(index: Index, sketches: np.ndarray) -> Requests:
    return {"sketch": [load_request(SketchQuery(sketch, index.fingerprint), k=3) for sketch in sketches]}


def each_has_a_status(measured: Measurement) -> bool:
    return measured.num_calls == sum(measured.codes.values()) > 0


async def test_of_many_calls_a_killed_model_process_costs_those_in_it(
    serve: Callable[..., Served], searches: Requests
) -> None:
    """Two are in a batch at the most, and the next batch may have been sent too; those that wait go on afterwards."""
    batch_size, kills, batches = 2, 2, 10
    served = serve(batch_size=batch_size)
    worker = served.server.catalog.worker

    async def kill() -> None:
        for number in range(1, kills + 1):
            await asyncio.to_thread(wait_for, lambda number=number: worker.num_starts == number and worker.pid, 90)
            # Each batch is one call of the model at each of two checkpoints. After one, a process that dies is started
            # again without a pause, in which calls would be refused.
            enough = served.gate.num_calls + 2 * batches
            await asyncio.to_thread(wait_for, lambda enough=enough: served.gate.num_calls > enough)
            os.kill(worker.pid or 0, signal.SIGKILL)
            await asyncio.to_thread(wait_for, lambda: worker.pid is None)
        await asyncio.to_thread(wait_for, lambda: worker.pid, 90)

    async def ask(requests: Requests, callers: int) -> Counter[str]:
        codes = Counter[str]()
        while not killing.done():
            measured = await load.closed(requests, callers, seconds=1)
            assert each_has_a_status(measured)
            codes.update(measured.codes)
        return codes

    async with Load(served.target, timeout_s=60) as load:
        killing = asyncio.create_task(kill())
        asked, searched = await asyncio.gather(ask(EXAMPLES, 2 * CALLERS), ask(searches, FOR_SKETCHES))
        await killing
        after = await load.closed(EXAMPLES, CALLERS, seconds=0.5)
    assert set(searched) == {OK}, "searches need no model"
    assert set(asked) <= {OK, "UNAVAILABLE"}, asked
    assert asked["UNAVAILABLE"] <= kills * 2 * batch_size, asked
    assert asked[OK] >= kills * batches, "at least one in each batch"
    assert set(after.codes) == {OK}
    assert worker.num_starts == 1 + kills


async def test_sigterm_under_load_answers_what_runs_and_refuses_what_comes(index_path: Path, tmp_path: Path) -> None:
    """Held in the model when the signal comes: as many calls as callers. All of them are answered."""
    gate, config = Gate(tmp_path), tmp_path / "serve.toml"
    config.write_text(
        f"port = 0\ngrace_s = 20\nindices = [{{path = '{index_path}', task = '{TASK_SPEC}', "
        f"task_arguments = {{gate = '{gate.folder}'}}}}]\n"
    )
    with commanded(config) as (child, _):
        target = f"127.0.0.1:{json.loads((tmp_path / 'ready.json').read_text())['port']}"
        async with Load(target, timeout_s=60) as load:
            before = await load.closed(EXAMPLES, CALLERS, seconds=0.5)
            gate.hold()
            held = asyncio.create_task(load.closed(EXAMPLES, CALLERS, seconds=0.2))
            await asyncio.to_thread(gate.wait_until_entered)
            await asyncio.sleep(0.5)
            child.send_signal(signal.SIGTERM)
            await asyncio.to_thread(wait_for, lambda: "stopping" in (tmp_path / "log").read_text())
            async with Load(target, timeout_s=5, seed=1) as late:
                refused = await late.closed(EXAMPLES, 1, seconds=0.2)
            async with AsyncClient(target, timeout_s=2) as client:
                with pytest.raises(UnavailableError):
                    await client.get_index()
            gate.open()
            answered = await held
        begin = time.monotonic()
        assert await asyncio.to_thread(child.wait, 20) == 0
        assert time.monotonic() - begin < 10, "it ends when nothing runs any more, not with the grace"
    assert set(before.codes) == {"OK"}
    assert answered.codes == {"OK": CALLERS}
    assert each_has_a_status(refused)
    # gRPC itself cancels what comes by a connection that was taken in the moment of the stop.
    assert "UNAVAILABLE" in refused.codes
    assert refused.codes.get("CANCELLED", 0) <= 1
    assert set(refused.codes) <= {"UNAVAILABLE", "CANCELLED"}


def test_sigterm_ends_a_stream_once_what_was_read_of_it_is_answered(index_path: Path, tmp_path: Path) -> None:
    gate, config = Gate(tmp_path), tmp_path / "serve.toml"
    config.write_text(
        f"port = 0\ngrace_s = 30\nindices = [{{path = '{index_path}', task = '{TASK_SPEC}', "
        f"task_arguments = {{gate = '{gate.folder}'}}}}]\n"
    )
    with commanded(config) as (child, client):
        stream = client.stream_influences((ExampleQuery(query) for query in cycle(QUERIES)), batch=1, k=1)
        assert isinstance(next(stream), InfluenceResult)
        gate.hold()
        with ThreadPoolExecutor() as pool:
            others = pool.submit(until_it_ends, stream)
            gate.wait_until_entered()
            child.send_signal(signal.SIGTERM)
            wait_for(lambda: "stopping" in (tmp_path / "log").read_text())
            gate.open()
            answers, error = others.result(60)
        begin = time.monotonic()
        assert child.wait(20) == 0
        assert time.monotonic() - begin < 10, "it ends when nothing runs any more, not with the grace"
    assert {type(answer) for answer in answers} == {InfluenceResult}
    assert "the server ends, and reads no more of this stream" in str(error)
    assert f"ask again in 1 s (the first {1 + len(answers)} queries of the stream are answered" in str(error)


def until_it_ends(stream: Iterator[Any]) -> tuple[list[Any], UnavailableError]:
    answers: list[Any] = []
    with pytest.raises(UnavailableError) as caught:
        answers.extend(stream)
    return answers, caught.value


async def test_sigterm_amid_calls_leaves_none_without_a_status(index_path: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(f"port = 0\nindices = [{{path = '{index_path}', task = '{TASK_SPEC}'}}]\n")
    with commanded(config) as (child, _):
        target = f"127.0.0.1:{json.loads((tmp_path / 'ready.json').read_text())['port']}"
        async with Load(target, timeout_s=60) as load:
            asyncio.get_running_loop().call_later(1, child.send_signal, signal.SIGTERM)
            measured = await load.open(EXAMPLES, 100, seconds=2)
        assert await asyncio.to_thread(child.wait, 20) == 0
    assert each_has_a_status(measured)
    assert {"OK", "UNAVAILABLE"} <= set(measured.codes) <= {"OK", "UNAVAILABLE", "CANCELLED"}, measured.codes


def test_a_thousand_connections_one_after_another_leave_nothing_behind(index_path: Path, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(f"port = 0\nindices = [{{path = '{index_path}', model = false}}]\n")
    with commanded(config) as (child, client):
        server, taken = f"127.0.0.1:{json.loads((tmp_path / 'ready.json').read_text())['port']}", []
        client.close()
        for number in range(RECONNECTS + 1):
            if number in (RECONNECTS // 10, RECONNECTS):
                taken.append(held_by(child.pid))
            with Client(server, overload_retries=0) as own:
                assert own.get_index().num_examples == 48
        early, late = taken
        wait_for(lambda: held_by(child.pid)["files"] <= early["files"])
        assert late["threads"] <= early["threads"] + 2, taken
        assert late["anonymous_kib"] - early["anonymous_kib"] < 8 << 10, f"900 connections: {taken}"


def held_by(pid: int) -> dict[str, Any]:
    status = Path(f"/proc/{pid}/status").read_text()
    return {
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": len(os.listdir(f"/proc/{pid}/task")),
        "anonymous_kib": int(status.partition("RssAnon:")[2].split()[0]),
    }


async def test_of_a_burst_of_callers_each_is_answered_or_told_to_come_back(serve: Callable[..., Served]) -> None:
    """More than gRPC lets wait by itself, which would cancel some."""
    served = serve(max_waiting=2)
    async with grpc.aio.insecure_channel(served.target) as channel:
        stub = AttributionStub(channel)

        async def ask() -> str:
            try:
                await stub.FindInfluences(EXAMPLES["example"][0], timeout=60)
            except grpc.aio.AioRpcError as error:
                return error.code().name
            return OK

        codes = Counter(await asyncio.gather(*(ask() for _ in range(1500))))
    assert set(codes) == {OK, "RESOURCE_EXHAUSTED"}
