"""`loopsway bench` against a real server: what it counts is what the server did."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest

from loopsway.client import IdQuery
from loopsway.client.channel import SERVICE
from loopsway.client.load import Load, Measurement, load_request
from loopsway.indexer import open_index
from loopsway.v1 import attribution_pb2 as pb
from serving import QUERIES

from .conftest import invoke

BRIEF = ["--duration", "0.5", "--warm-up", "0.1"]


def benched(target: str, *arguments: str | Path) -> dict[str, Any]:
    result = invoke(["bench", "--target", target, "--json", *BRIEF, *arguments])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def mix(tiny_index: Path, tmp_path: Path) -> list[str | Path]:
    """Options that name queries of every kind."""
    index = open_index(tiny_index)
    lines, sketches = tmp_path / "queries.jsonl", tmp_path / "sketches.npy"
    lines.write_text("\n".join(map(json.dumps, QUERIES)) + "\n\n")
    np.save(sketches, np.random.default_rng(0).standard_normal((2, index.num_steps, index.width), np.float32))
    return ["--queries", lines, "--ids", "tiny-0,tiny-7", "--sketches", sketches, "--fingerprint", index.fingerprint]


def test_callers_ask_every_kind_of_query_and_each_call_is_counted(target: str, mix: list[str | Path]) -> None:
    document = benched(target, *mix, "--concurrency", "3")
    assert document["concurrency"] == 3
    assert {row["kind"] for row in document["kinds"]} == {"example", "id", "sketch"}
    assert document["codes"] == {"OK": document["calls"]}
    assert sum(row["calls"] for row in document["kinds"]) == document["calls"]
    assert document["throughput"] == pytest.approx(document["calls"] / document["seconds"], rel=0.01)
    times = document["latency_ms"]
    assert 0 < times["p50"] <= times["p95"] <= times["p99"] <= times["max"]


def test_calls_at_random_times_come_at_their_rate(target: str, mix: list[str | Path]) -> None:
    document = benched(target, *mix, "--rate", "60", "--duration", "3")
    count, mean = document["calls"], 60 * 3
    assert abs(count - mean) <= 5 * mean**0.5, f"{count} calls; Poisson's deviation is {mean**0.5:.0f}"
    assert document["codes"] == {"OK": count}


def test_a_table_is_for_people(target: str) -> None:
    result = invoke(["bench", "--target", target, *BRIEF, "--ids", "tiny-0"])
    assert result.exit_code == 0, result.output
    for text in ("tiny at", "48 examples, 3 steps", "1 at once", "answered", "p99 ms", "id", "OK"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "name one or more queries"),
        (["--ids", "tiny-0", "--rate", "5", "--concurrency", "2"], "give one"),
        (["--ids", "none"], "none"),
        (["--ids", "tiny-0", "--index", "other"], "no index 'other'"),
    ],
)
def test_what_cannot_be_measured_is_said(target: str, arguments: list[str], text: str) -> None:
    result = invoke(["bench", "--target", target, *BRIEF, *arguments])
    assert result.exit_code in (1, 2)
    assert text in result.stderr


async def with_server(answer: Callable[[int], Any], ask: Callable[[Load], Any]) -> tuple[Measurement, int]:
    """What a load measured of a server that answers its calls, by their number, as told; and their count."""
    count = 0

    async def find_influences(request: Any, context: Any) -> pb.FindInfluencesResponse:
        nonlocal count
        count += 1
        if (code := await answer(count)) is not None:
            await context.abort(code, "told so")
        return pb.FindInfluencesResponse()

    handler = grpc.unary_unary_rpc_method_handler(
        find_influences, pb.FindInfluencesRequest.FromString, pb.FindInfluencesResponse.SerializeToString
    )
    server = grpc.aio.server()
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"FindInfluences": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with Load(f"127.0.0.1:{port}") as load:
            return await ask(load), count
    finally:
        await server.stop(0)


REQUESTS = {"id": [load_request(IdQuery("tiny-0"))]}


async def test_no_call_is_sent_twice() -> None:
    """The ordinary clients send a call again that a server refuses with UNAVAILABLE."""

    async def answer(number: int) -> grpc.StatusCode | None:
        await asyncio.sleep(0.01)
        return grpc.StatusCode.UNAVAILABLE if number % 2 else None

    measured, count = await with_server(answer, lambda load: load.closed(REQUESTS, 2, seconds=0.5))
    assert measured.num_calls == count
    assert measured.codes == {"OK": count // 2, "UNAVAILABLE": count - count // 2}


async def test_time_in_which_the_server_stands_still_counts_for_every_call_that_falls_into_it() -> None:
    """A halt of half a second, under 200 calls a second: 100 calls wait for 0.25 s on average, not one for 0.5."""
    opened = asyncio.Event()

    async def answer(number: int) -> None:
        if number == 1:
            asyncio.get_running_loop().call_later(0.5, opened.set)
        await opened.wait()

    measured, _ = await with_server(answer, lambda load: load.open(REQUESTS, 200, seconds=1))
    delayed = [each for each in measured.durations_of() if each > 0.1]
    assert len(delayed) == pytest.approx(80, abs=5 * 80**0.5)
    assert sum(delayed) / len(delayed) == pytest.approx(0.3, abs=0.06)


async def test_a_caller_that_is_itself_late_says_so_and_counts_it() -> None:
    """What asks is held for 0.3 s: the calls meant for then are sent late, and their time runs from when they were."""

    async def answer(number: int) -> None:
        if number == 20:
            time.sleep(0.3)

    measured, _ = await with_server(answer, lambda load: load.open(REQUESTS, 200, seconds=1))
    assert measured.lag_s == pytest.approx(0.3, abs=0.1)
    assert sum(each > 0.1 for each in measured.durations_of()) >= 20, "of the 40 that were meant to be sent"
