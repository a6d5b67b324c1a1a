"""Whatever comes in, every method answers or refuses by a code that blames the caller, and the server lives on.

A call that fails is shrunk, and printed with its messages.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import hypothesis
import numpy as np
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import HealthCheck, Phase, given, settings

from loopsway.client import Client, ExampleQuery
from loopsway.indexer import Index
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import to_tensor
from serving import QUERIES, TASK_SPEC, wait_for

from . import watched_server
from .damage import Call, calls

METHODS = pb.DESCRIPTOR.services_by_name["Attribution"].methods
ROUNDS, CALLS, AT_ONCE = 4, 500, 8  # CALLS of each method in each round
GROWTH_BYTES = 8 << 20  # over half of the calls: 0.8 KiB a call; buffers of some MiB come and go
BLAMING = {
    *(grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND),
    *(grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED),
}


def seeds(index: Index) -> dict[str, list[Call]]:
    """Good calls of every method."""
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


class DiedError(BaseException):
    """The server's process ended. No Exception: Hypothesis would shrink the call, though no server is there for it."""


@dataclass(frozen=True)
class Watched:
    """`loopsway serve` in a process of its own."""

    child: subprocess.Popen[bytes]
    target: str
    told: Path

    def used_bytes(self) -> int:
        self.told.unlink(missing_ok=True)
        self.child.send_signal(signal.SIGUSR1)
        wait_for(self.told.exists, 60)
        return int(self.told.read_text())

    def model_bytes(self) -> int:
        """Memory of the model's process that no file backs."""
        (model,) = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split()
        return int(Path(f"/proc/{model}/status").read_text().partition("RssAnon:")[2].split()[0]) << 10

    def check_lives(self, call: str) -> None:
        """Waits, as connections end before their process does."""
        try:
            status = self.child.wait(1)
        except subprocess.TimeoutExpired:
            return
        raise DiedError(f"the server ended with {status} under this call, or one at the same time: {call}")


@contextmanager
def watched(index_path: Path, folder: Path) -> Iterator[Watched]:
    ready, told, log = folder / "ready", folder / "told", folder / "log"
    options = ["--index", str(index_path), "--task", TASK_SPEC, "--port", "0", "--ready-file", str(ready)]
    command = [sys.executable, "-W", "error", watched_server.__file__, str(told), "serve", *options]
    environment = os.environ | watched_server.ENVIRONMENT
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment) as child,
    ):
        try:
            wait_for(lambda: ready.exists() or child.poll() is not None, 120)
            assert child.poll() is None, log.read_text()
            yield Watched(child, f"127.0.0.1:{json.loads(ready.read_text())['port']}", told)
        finally:
            child.terminate()


def outcome(channel: grpc.Channel, method: MethodDescriptor, messages: list[bytes]) -> tuple[grpc.StatusCode, str]:
    """The code and the text that a call ends with."""
    incoming, outgoing = ("stream" if each else "unary" for each in (method.client_streaming, method.server_streaming))
    call = getattr(channel, f"{incoming}_{outgoing}")(f"/{method.containing_service.full_name}/{method.name}")
    try:
        answer = call(iter(messages) if method.client_streaming else messages[0], timeout=30)
        for _response in answer if method.server_streaming else ():
            pass
    except grpc.RpcError as error:
        failure: Any = error
        return failure.code(), failure.details()
    return grpc.StatusCode.OK, ""


def bombard(
    server: Watched, channel: grpc.Channel, method: MethodDescriptor, goods: list[Call], seed: int
) -> list[Any]:
    """The method and the code of every call."""
    answers: list[Any] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=CALLS,
        database=None,
        deadline=None,  # others are served at the same time, and others draw: that is slow, and no fault
        suppress_health_check=[HealthCheck.too_slow],
        phases=[Phase.generate, Phase.shrink],
    )
    @given(calls(goods))
    def send(messages: list[bytes]) -> None:
        code, text = outcome(channel, method, messages)
        answers.append((method.name, code))
        if code == grpc.StatusCode.UNAVAILABLE:
            server.check_lives(f"{method.name} {messages}")
        assert code in BLAMING, f"{method.name} answered {code}: {text}"

    send()
    return answers


def bombarded(server: Watched, channel: grpc.Channel, requests: dict[str, list[Call]], seed: int) -> Counter[Any]:
    """How often each method answered with each code, of CALLS each."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(bombard, server, channel, each, requests[each.name], seed) for each in METHODS]
    if failures := [failure for each in futures if (failure := each.exception()) is not None]:
        raise BaseExceptionGroup("calls that were not refused as they should be", failures)
    return Counter(answer for each in futures for answer in each.result())


@pytest.mark.timeout(900)  # a minute of two processors that are free
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33, which tells what is in use")
def test_twenty_thousand_damaged_calls_are_refused_and_the_server_lives_on(
    index_path: Path, index: Index, tmp_path: Path
) -> None:
    requests, codes, used, model = seeds(index), Counter[Any](), list[int](), list[int]()
    assert set(requests) == {method.name for method in METHODS}
    with watched(index_path, tmp_path) as server:
        with grpc.insecure_channel(server.target, options=[("grpc.enable_http_proxy", 0)]) as channel:
            for seed in range(ROUNDS):
                codes += bombarded(server, channel, requests, seed)
                used.append(server.used_bytes())
                model.append(server.model_bytes())
            health: Any = health_pb2_grpc.HealthStub(channel)
            for service in ("", "loopsway.v1.Attribution"):
                status = health.Check(health_pb2.HealthCheckRequest(service=service)).status
                assert status == health_pb2.HealthCheckResponse.SERVING
        print(f"{codes.total()} calls, {used} bytes in use, {model} of the model's process: {codes}")
        with Client(server.target) as client:
            assert client.find_influences([ExampleQuery(QUERIES[0])])
    assert codes.total() == 20_000
    for name in requests:
        assert codes[name, grpc.StatusCode.OK] > 20, f"the calls of {name} are too damaged to test what lies behind"
        if name not in ("ListIndices", "StreamInfluences"):
            assert codes[name, grpc.StatusCode.INVALID_ARGUMENT] > 20, name
    for held in (used, model):
        assert min(held[ROUNDS // 2 :]) - min(held[: ROUNDS // 2]) < GROWTH_BYTES, held
    assert " ERROR " not in (tmp_path / "log").read_text()
