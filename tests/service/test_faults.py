"""The model's process may die or run out of memory: what was under way is told so, and the service goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from loopsway.client import AsyncClient, Client, ExampleQuery, InfluenceResult, UnavailableError
from loopsway.indexer import Checkpoint, Index, load_task
from loopsway.indexer.memory import is_device_fault, is_out_of_memory
from loopsway.indexer.search.sharded import LocalShards, Method, ShardedReader
from loopsway.indexer.sketches.weights import size_of
from loopsway.service import Settings, stretches
from loopsway.service.frames import encoded
from loopsway.service.model_life import OF_PROCESS
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import to_tensor
from serving import QUERIES, TASK_SPEC, Served, assert_alike, wait_for


def example(query: object) -> pb.FindInfluencesRequest:
    return pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(query))], k=3)


def kill(served: Served) -> None:
    """Kills the model's process as a segmentation fault or the kernel's out-of-memory killer would."""
    pid = served.server.catalog.worker.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def retry_after_s(call: Any) -> float:
    status, retry = rpc_status.from_call(call), error_details_pb2.RetryInfo()
    assert status is not None
    assert status.details[0].Unpack(retry)
    return retry.retry_delay.ToMilliseconds() / 1000


def test_a_killed_model_process_costs_the_queries_under_way_and_nothing_else(
    serve: Callable[..., Served], index: Index, sketches: np.ndarray
) -> None:
    """Two queries in the model, two that wait for it, and twenty searches meanwhile, which need none."""
    served = serve(batch_size=2)
    worker = served.server.catalog.worker
    alone = [served.stub.FindInfluences(example(query)) for query in QUERIES]
    served.gate.hold()
    both = pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(query)) for query in QUERIES[:2]], k=3)
    under_way = served.stub.FindInfluences.future(both)
    served.gate.wait_until_entered()
    waiting = [served.stub.FindInfluences.future(example(query)) for query in QUERIES[2:]]
    wait_for(lambda: served.engine.num_admitted == 3)
    kill(served)
    sketch = pb.Query(sketch=pb.Sketch(fingerprint=index.fingerprint, values=to_tensor(sketches[0])))
    searches = [served.stub.FindInfluences(pb.FindInfluencesRequest(queries=[sketch], k=3)) for _ in range(20)]
    assert_alike(searches, alone[:1] * 20)
    assert under_way.code() == grpc.StatusCode.UNAVAILABLE
    assert "process" in under_way.details()
    assert retry_after_s(under_way) == 1.0
    served.gate.open()
    assert_alike([call.result(60) for call in waiting], alone[2:])
    assert_alike([served.stub.FindInfluences(both)], [served.stub.FindInfluences(both)])
    assert worker.num_starts == 2
    health: Any = health_pb2_grpc.HealthStub(served.channel)
    assert health.Check(health_pb2.HealthCheckRequest(service="tiny")).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("retries", [0, 2])
async def test_a_batch_in_a_process_that_dies_is_asked_again_or_says_when(
    serve: Callable[..., Served], retries: int
) -> None:
    served = serve()

    def ask() -> list[Any]:
        with Client(served.target, overload_retries=retries) as client:
            return list(client.stream_influences([ExampleQuery(QUERIES[0])], k=1, request_id="mine"))

    async def ask_too() -> list[Any]:
        async with AsyncClient(served.target, overload_retries=retries) as client:
            queries = [ExampleQuery(QUERIES[0])]
            return [each async for each in client.stream_influences(queries, k=1, request_id="mine")]

    for asking in (lambda: asyncio.to_thread(ask), ask_too):
        served.gate.hold()
        stream = asyncio.ensure_future(asking())
        await asyncio.to_thread(served.gate.wait_until_entered)
        kill(served)
        served.gate.open()
        [answer] = await stream
        if retries:
            assert isinstance(answer, InfluenceResult)
            continue
        assert isinstance(answer, UnavailableError)
        assert (answer.retry_after_s, answer.request_id) == (1, "mine")
        assert str(answer).endswith("ask again in 1 s")
        wait_for(lambda: served.server.catalog.worker.pid)


class ScantShards(LocalShards):
    """Have no memory for the first question of each method."""

    def __init__(self, index: Index) -> None:
        super().__init__([index.codes])
        self._asked: set[str] = set()

    def ask(self, method: Method, arguments: Sequence[Any], **options: Any) -> list[Any]:
        if method not in self._asked:
            self._asked.add(method)
            raise MemoryError("Unable to allocate 40.0 GiB") if method == "search" else torch.OutOfMemoryError("CUDA")
        return super().ask(method, arguments, **options)


def test_a_search_without_memory_is_unavailable_and_the_next_one_is_answered(
    serve: Callable[..., Served], index: Index, sketches: np.ndarray
) -> None:
    served = serve(model=False, retry_after_s=2.5)
    query = pb.Query(sketch=pb.Sketch(fingerprint=index.fingerprint, values=to_tensor(sketches[0])))
    asks: list[Callable[[], Any]] = [
        lambda: served.stub.FindInfluences(pb.FindInfluencesRequest(queries=[query], k=3)),
        lambda: list(served.stub.ScoreExamples(pb.ScoreExamplesRequest(queries=[query]))),
        lambda: served.stub.FindNeighbors(pb.FindNeighborsRequest(example_ids=["tiny-3"])),
    ]
    expected = [ask() for ask in asks]
    served.engine.index.reader = ShardedReader(ScantShards(served.engine.index))
    for ask, answer in zip(asks, expected, strict=True):
        with pytest.raises(grpc.RpcError) as caught:
            ask()
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "too little memory for this request now" in error.details()
        assert "GiB" not in error.details()
        assert retry_after_s(error) == 2.5
        assert ask() == answer


def test_a_stream_of_scores_for_which_memory_runs_out_is_unavailable(
    serve: Callable[..., Served], index: Index, sketches: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, made = serve(model=False, retry_after_s=2.5), count()

    def scant(**fields: Any) -> stretches.Stretch:
        if next(made) == 2:
            raise MemoryError("Unable to allocate 40.0 GiB")
        return stretch(**fields)

    stretch = stretches.Stretch
    monkeypatch.setattr(stretches, "Stretch", scant)
    query = pb.Query(sketch=pb.Sketch(fingerprint=index.fingerprint, values=to_tensor(sketches[0])))
    call = served.stub.ScoreExamples(pb.ScoreExamplesRequest(queries=[query]))
    assert [next(call).HasField("step") for _ in range(2)] == [False, True]  # the total, and step 0
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert retry_after_s(error) == 2.5


def test_a_model_process_ends_in_silence_when_its_server_is_gone() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.shutdown(socket.SHUT_RD)  # nobody reads its answers any more
        facts = Settings(log_format="json").model_dump(include=OF_PROCESS)
        ended = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "loopsway.service.model_process",
                json.dumps(facts | {"descriptor": theirs.fileno()}),
            ],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
        ours.sendall(encoded({"kind": "forget", "key": "none", "id": 0}))
        assert ended.communicate(timeout=60) == (None, b"")
        assert ended.returncode == 0


def test_a_process_that_dies_again_is_started_after_a_pause(serve: Callable[..., Served]) -> None:
    served = serve()
    worker = served.server.catalog.worker
    for starts in (1, 2):
        wait_for(lambda: worker.pid is not None)
        kill(served)
        wait_for(lambda starts=starts: worker.pid is None or worker.num_starts > starts)
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.FindInfluences(example(QUERIES[0]))
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    delay = retry_after_s(caught.value)
    assert 0 < delay <= 0.5
    time.sleep(delay)
    assert served.stub.FindInfluences(example(QUERIES[0])).results
    assert worker.num_starts == 3


def test_a_batch_that_memory_does_not_suffice_for_is_answered_one_by_one(serve: Callable[..., Served]) -> None:
    served = serve()
    alone = [served.stub.FindInfluences(example(query)) for query in QUERIES]
    together = pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(query)) for query in QUERIES], k=3)
    served.gate.suffice_for(2)
    before = served.gate.num_calls
    answer = served.stub.FindInfluences(together)
    parts = [pb.FindInfluencesResponse(results=[result]) for result in answer.results]
    assert_alike(parts, alone)
    assert served.gate.num_calls - before == 1 + 4 * 2, "the whole batch at one checkpoint, then each at both"


def test_a_query_that_memory_does_not_suffice_for_is_unavailable_until_it_does(serve: Callable[..., Served]) -> None:
    served = serve(retry_after_s=1.5)
    served.gate.suffice_for(0)
    with Client(served.target) as client, pytest.raises(UnavailableError, match=r"too little memory.*again in 1.5 s"):
        client.find_influences([ExampleQuery(QUERIES[0])])
    served.gate.suffice_for(8)
    assert served.stub.FindInfluences(example(QUERIES[0])).results
    assert served.server.catalog.worker.num_starts == 1, "the process goes on"


def test_a_model_that_could_not_be_loaded_after_a_crash_is_loaded_when_it_can_be(serve: Callable[..., Served]) -> None:
    served = serve()
    worker = served.server.catalog.worker
    before, pid = served.stub.FindInfluences(example(QUERIES[0])), worker.pid
    served.gate.hide_weights()
    kill(served)
    wait_for(lambda: worker.pid not in (None, pid))
    for _ in range(2):
        with pytest.raises(grpc.RpcError) as caught:
            served.stub.FindInfluences(example(QUERIES[0]))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "could not load the model" in str(caught.value)
        assert 0 < retry_after_s(caught.value) <= 2, "pauses grow from half a second"
    served.gate.show_weights()
    time.sleep(retry_after_s(caught.value))
    assert_alike([served.stub.FindInfluences(example(QUERIES[0]))], [before])
    assert worker.num_starts == 2, "by the same process"


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:132] DefaultCPUAllocator: can't allocate memory: you tried to"),
    MemoryError("Unable to allocate 40.0 GiB"),
]
DEVICE_FAULTS = [
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
]


def test_a_lack_of_memory_is_told_from_a_fault_of_the_device_and_from_others() -> None:
    errors = [*OUT_OF_MEMORY, *DEVICE_FAULTS, RuntimeError("shapes don't match"), ValueError("no")]
    assert [error for error in errors if is_out_of_memory(error)] == OUT_OF_MEMORY
    assert [error for error in errors if is_device_fault(error)] == DEVICE_FAULTS


def test_after_a_fault_of_the_device_another_process_answers(serve: Callable[..., Served]) -> None:
    served = serve()
    worker = served.server.catalog.worker
    before, pid = served.stub.FindInfluences(example(QUERIES[0])), worker.pid
    served.gate.break_device()
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.FindInfluences(example(QUERIES[0]))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    wait_for(lambda: worker.pid not in (None, pid))
    assert_alike([served.stub.FindInfluences(example(QUERIES[0]))], [before])
    assert worker.num_starts == 2


def test_checkpoints_move_in_and_out_within_the_budget(serve: Callable[..., Served], served: Served) -> None:
    size = size_of(load_task(TASK_SPEC).model(Checkpoint(name="early", learning_rate=0.1)))
    cramped = serve(model_bytes=size)
    requests = [example(query) for query in QUERIES]
    with ThreadPoolExecutor(4) as clients:
        assert_alike(list(clients.map(cramped.stub.FindInfluences, requests)),
                     list(clients.map(served.stub.FindInfluences, requests)))  # fmt: skip
    before = cramped.gate.num_loads
    for _ in range(3):
        cramped.stub.FindInfluences(requests[0])
    assert cramped.gate.num_loads - before == 3, "the other of the two checkpoints, each time"
    assert served.gate.num_loads == 2, "both fit into the default budget: none left"
