"""Under load: answers stay those of a quiet server, the queue is bounded, and what nobody waits for costs nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from serving import QUERIES, Served, assert_alike, wait_for

EXAMPLE = pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(QUERIES[0]))], k=3)


@pytest.fixture
def held(serve: Callable[..., Served]) -> Iterator[tuple[Served, grpc.Future]]:
    """A server that admits two waiting requests, and a first request, held in the model until the gate opens."""
    served = serve(max_waiting=2)
    served.gate.hold()
    first = served.stub.FindInfluences.future(EXAMPLE)
    served.gate.wait_until_entered()
    yield served, first
    served.gate.open()


def test_a_full_queue_is_resource_exhausted_and_says_when_to_come_back(held: tuple[Served, grpc.Future]) -> None:
    served, first = held
    waiting = [served.stub.FindInfluences.future(EXAMPLE) for _ in range(2)]
    wait_for(lambda: served.engine.num_admitted == 3)
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.FindInfluences(EXAMPLE)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    retry = error_details_pb2.RetryInfo()
    call: Any = caught.value  # gRPC's errors are calls too
    status = rpc_status.from_call(call)
    assert status is not None
    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1000
    served.gate.open()
    answers = [call.result(60) for call in (first, *waiting)]
    assert_alike(answers, [served.stub.FindInfluences(EXAMPLE)] * 3)


def test_requests_that_nobody_waits_for_cost_no_model_call(held: tuple[Served, grpc.Future]) -> None:
    served, first = held
    before = served.gate.num_calls  # the held one's first of two: one for each checkpoint
    cancelled = served.stub.FindInfluences.future(EXAMPLE)
    wait_for(lambda: served.engine.num_admitted == 2)
    cancelled.cancel()
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.FindInfluences(EXAMPLE, timeout=0.2)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    wait_for(lambda: served.engine.num_admitted == 1)
    served.gate.open()
    assert first.result(60).results
    after = served.stub.FindInfluences(EXAMPLE)  # behind them in the queue: they are over when it is
    assert after.results
    assert served.gate.num_calls - before == 1 + 2


def test_a_request_cancelled_in_the_model_costs_no_further_checkpoint(held: tuple[Served, grpc.Future]) -> None:
    served, first = held
    before = served.gate.num_calls
    first.cancel()
    wait_for(lambda: served.engine.num_admitted == 0)
    served.gate.open()
    assert served.stub.FindInfluences(EXAMPLE).results
    assert served.gate.num_calls - before == 2, "the late checkpoint was run for the second request alone"


def example(query: object) -> pb.FindInfluencesRequest:
    return pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(query))], k=3)


def test_requests_that_wait_share_a_batch_and_answer_as_alone(serve: Callable[..., Served]) -> None:
    served = serve(max_waiting=10)
    alone = [served.stub.FindInfluences(example(query)) for query in QUERIES]
    served.gate.hold()
    first = served.stub.FindInfluences.future(EXAMPLE)
    served.gate.wait_until_entered()
    before = served.gate.num_calls  # one for each checkpoint and batch; the held one's first is counted
    not_json = pb.FindInfluencesRequest(queries=[pb.Query(example_json='{"tokens": [')])
    good = [served.stub.FindInfluences.future(example(query)) for query in QUERIES]
    refused = [served.stub.FindInfluences.future(bad) for bad in (example(QUERIES[0] | {"tokens": [9] * 6}), not_json)]
    wait_for(lambda: served.engine.num_admitted == 7)
    served.gate.open()
    assert_alike([call.result(60) for call in (first, *good)], [alone[0], *alone])
    for call, text in zip(refused, ("tokens is", "not JSON: "), strict=True):
        assert call.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert text in call.details()
    assert served.gate.num_calls - before == 1 + 2, "the four were sketched together"


def test_a_query_that_the_model_cannot_run_fails_alone(held: tuple[Served, grpc.Future]) -> None:
    served, first = held
    good = served.stub.FindInfluences.future(example(QUERIES[1]))
    bad = served.stub.FindInfluences.future(example(QUERIES[0] | {"num_steps": 0}))
    wait_for(lambda: served.engine.num_admitted == 3)
    served.gate.open()
    assert first.result(60).results
    assert_alike([good.result(60)], [served.stub.FindInfluences(example(QUERIES[1]))])
    assert bad.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "can't run this example" in bad.details()


def test_a_lone_query_waits_for_others_only_when_told_to(serve: Callable[..., Served]) -> None:
    served = serve(batch_delay_s=0.3)
    begin = time.monotonic()
    calls = [served.stub.FindInfluences.future(example(query)) for query in QUERIES]
    before = served.gate.num_calls
    for call in calls:
        assert call.result(60).results
    assert served.gate.num_calls - before <= 4
    assert time.monotonic() - begin > 0.3


def test_clients_at_once_get_the_answers_they_get_alone(served: Served) -> None:
    requests = [
        pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(query))], k=5, resolve=mode)
        for query in QUERIES
        for mode in (pb.RESOLVE_MODE_QUERY_STEP, pb.RESOLVE_MODE_TRAIN_STEP)
    ]
    alone = [served.stub.FindInfluences(request) for request in requests]

    def client(offset: int) -> list[tuple[int, pb.FindInfluencesResponse]]:
        options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(served.target, options=options) as channel:
            stub = AttributionStub(channel)
            order = [(offset + i) % len(requests) for i in range(2 * len(requests))]
            return [(i, stub.FindInfluences(requests[i])) for i in order]

    with ThreadPoolExecutor(6) as clients:
        for answers in clients.map(client, range(6)):
            for i, answer in answers:
                assert_alike([answer], [alone[i]])
