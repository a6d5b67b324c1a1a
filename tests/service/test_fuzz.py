"""Whatever comes in, every method answers or refuses by a code that blames the caller, and the server lives on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf.message import Message

from loopsway.client import Client, ExampleQuery
from loopsway.indexer import Index
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import to_tensor
from serving import QUERIES, TASK_SPEC

from ..conftest import COMMAND

INPUTS, WARM_UP, AT_ONCE = 20_000, 4_000, 32
GROWTH_BYTES = 96 << 20  # of the server, over all inputs after the first
# What asyncio's client says of a stream that the server ends while the client still begins it: it loses the status, and
# the blocking client is asked for it.
LOST = "Internal error from Core"
BLAMING = {
    *(grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND),
    *(grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED),
}
EXTREMES = {
    int: [0, 1, -1, 2, 2**31 - 1, -(2**31)],
    float: [0.0, -1.0, 1e300, float("nan"), float("inf"), 5e-324],
    str: ["", "tiny", "tiny-0", "\0", "ü" * 5000, "id == 'x'", "((((", "[" * 200, '{"tokens": "\\ud800"}', "\u202e"],
    bytes: [b"", b"\0" * 7, b"\xff" * 4096],
}


def seeds(index: Index) -> dict[str, list[list[Any]]]:
    """Good requests of every method, each with the messages of its stream."""
    values = to_tensor(np.ones((3, 256), np.float32))
    sketch = pb.Query(sketch=pb.Sketch(fingerprint=index.fingerprint, values=values))
    queries = [sketch, pb.Query(example_json=json.dumps(QUERIES[0])), pb.Query(example_id="tiny-1")]
    find = pb.FindInfluencesRequest(
        index="tiny", queries=queries, k=3, steps=[0, 2], where="row < 9", resolve=pb.RESOLVE_MODE_QUERY_STEP
    )
    lone = pb.FindInfluencesRequest(queries=[sketch], approximate=True, include_trajectories=True)
    ids = ["tiny-0", "tiny-7"]
    header = pb.GradientHeader(index="tiny", step_count=3, total_bytes=64)
    dense = pb.DenseGradient(values=to_tensor(np.ones(16, np.float32)), start=0)
    piece = pb.GradientPiece(checkpoint="early", parameter="block.0.weight", step=1, dense=dense)
    gradients = [
        {"header": header},
        {"piece": piece},
        {"end": pb.GradientEnd(sha256=hashlib.sha256(dense.values.data).digest())},
    ]
    return {
        "GetIndex": [[pb.GetIndexRequest(index="tiny")]],
        "ListIndices": [[pb.ListIndicesRequest()]],
        "FindInfluences": [[find], [lone]],
        "StreamInfluences": [[pb.StreamInfluencesRequest(tag=str(i), request=lone) for i in range(2)]],
        "GetTrajectories": [
            [pb.GetTrajectoriesRequest(queries=[sketch], example_ids=ids, resolve=mode, steps=steps)]
            for mode, steps in ((pb.RESOLVE_MODE_STEP_MATRIX, []), (pb.RESOLVE_MODE_TRAIN_STEP, [0, 2]))
        ],
        "ScoreExamples": [[pb.ScoreExamplesRequest(queries=[sketch], top_share=0.1, where="row < 40", steps=[1])]],
        "FindNeighbors": [[pb.FindNeighborsRequest(example_ids=ids, k=2, step=1, threshold=0.1)]],
        "SketchQueries": [[pb.SketchQueriesRequest(queries=queries[:2])]],
        "ReloadIndex": [[pb.ReloadIndexRequest(index="tiny")]],
        "SketchGradients": [[pb.SketchGradientsRequest(**part) for part in gradients]],
    }


def mutated(draw: random.Random, message: Message) -> bytes:
    """The message with a field set to something extreme, or its bytes damaged, or both."""
    message = type(message).FromString(message.SerializeToString())
    if draw.random() < 0.6:
        change_field(draw, message)
    data = bytearray(message.SerializeToString())
    for _ in range(draw.choice([0, 1, 1, 2, 8])):
        place = draw.randrange(len(data) + 1)
        match draw.randrange(4):
            case 0 if place < len(data):
                data[place] ^= 1 << draw.randrange(8)
            case 1:
                del data[place : place + draw.choice([1, 2, 16, 4096])]
            case 2:
                data[place:place] = draw.randbytes(draw.choice([1, 2, 16]))
            case _:
                data[place:place] = data[: draw.randrange(64)]
    return bytes(data)


def change_field(draw: random.Random, message: Message) -> None:
    """Sets one field, at any depth, to an extreme value of its type."""
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    field = draw.choice(fields)
    value: Any = getattr(message, field.name)
    if field.message_type is not None:
        if not field.is_repeated:
            change_field(draw, value)
        elif value and draw.random() < 0.9:
            change_field(draw, draw.choice(value))
        else:
            value.extend(list(value) * draw.choice([1, 30]))
        return
    kind = type(value[0]) if field.is_repeated and value else int if field.is_repeated else type(value)
    choice = draw.choice(EXTREMES.get(kind, [0]))
    if not field.is_repeated:
        setattr(message, field.name, choice)
    elif value:
        value.extend([choice] * draw.choice([1, 20]))


async def outcome(answer: Any, outgoing: str) -> tuple[grpc.StatusCode, str]:
    """The code and the text that a call ends with."""
    try:
        if outgoing == "stream":
            async for _response in answer:
                pass
        else:
            await answer
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    return grpc.StatusCode.OK, ""


async def bombarded(target: str, requests: dict[str, list[list[Any]]], count: int, seed: int) -> Counter[Any]:
    """How often each method answered with each code."""
    draw, codes, wrong = random.Random(seed), Counter(), list[str]()
    service = pb.DESCRIPTOR.services_by_name["Attribution"]
    async with grpc.aio.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        calls: dict[str, Any] = {}
        for method in service.methods:
            kinds = ("stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary")
            make = getattr(channel, "_".join(kinds))
            calls[method.name] = (make(f"/{service.full_name}/{method.name}"), *kinds)

        def blocking(name: str, messages: list[bytes]) -> tuple[grpc.StatusCode, str]:
            _, incoming, outgoing = calls[name]
            with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as other:
                call = getattr(other, f"{incoming}_{outgoing}")(f"/{service.full_name}/{name}")
                try:
                    answer = call(iter(messages) if incoming == "stream" else messages[0], timeout=30)
                    for _response in answer if outgoing == "stream" else ():
                        pass
                except grpc.RpcError as error:
                    failure: Any = error
                    return failure.code(), failure.details()
            return grpc.StatusCode.OK, ""

        async def bombard(inputs: int) -> None:
            for _ in range(inputs):
                name = draw.choice(list(calls))
                call, incoming, outgoing = calls[name]
                good = draw.choice(requests[name])
                damaged = draw.randrange(len(good))  # of a stream one message, or what is behind the first is never met
                messages = [
                    mutated(draw, each) if i == damaged else each.SerializeToString() for i, each in enumerate(good)
                ]
                request = iter(messages) if incoming == "stream" else messages[0]
                code, text = await outcome(call(request, timeout=30), outgoing)
                if text == LOST:
                    code, text = await asyncio.to_thread(blocking, name, messages)
                codes[name, code] += 1
                if code not in BLAMING:
                    wrong.append(f"{name} {code} {text} {messages}")

        await asyncio.gather(*(bombard(count // AT_ONCE) for _ in range(AT_ONCE)))
    assert not wrong, "\n".join(wrong[:10])
    return codes


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the server's memory is read from /proc")
def test_twenty_thousand_damaged_requests_are_refused_and_the_server_lives_on(
    index_path: Path, index: Index, tmp_path: Path
) -> None:
    ready, log = tmp_path / "ready", tmp_path / "log"
    options = ["--index", str(index_path), "--task", TASK_SPEC, "--port", "0", "--ready-file", str(ready)]
    with (
        log.open("wb") as output,
        subprocess.Popen([*COMMAND, "serve", *options], stdout=output, stderr=output) as child,
    ):
        try:
            deadline = time.monotonic() + 120
            while not ready.exists():
                assert child.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            target, requests = f"127.0.0.1:{json.loads(ready.read_text())['port']}", seeds(index)
            assert set(requests) == {method.name for method in pb.DESCRIPTOR.services_by_name["Attribution"].methods}
            start = time.monotonic()
            codes = asyncio.run(bombarded(target, requests, WARM_UP, 0))
            before = resident_bytes(child.pid)
            codes += asyncio.run(bombarded(target, requests, INPUTS - WARM_UP, 1))
            grown, seconds = resident_bytes(child.pid) - before, time.monotonic() - start
            print(f"{codes.total()} inputs in {seconds:.0f} s, {grown / 2**20:.0f} MiB more: {codes}")
            with Client(target) as client:
                assert client.find_influences([ExampleQuery(QUERIES[0])])
        finally:
            child.terminate()
    assert codes.total() == INPUTS
    for name in requests:
        assert codes[name, grpc.StatusCode.OK] > 20, f"the inputs of {name} are too damaged to test what lies behind"
        if name not in ("ListIndices", "StreamInfluences"):
            assert codes[name, grpc.StatusCode.INVALID_ARGUMENT] > 20, name
    assert grown < GROWTH_BYTES
    assert " ERROR " not in log.read_text()
