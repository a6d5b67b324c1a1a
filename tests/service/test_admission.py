"""A request is let in if what is before it will soon be done, as far as what was done last can tell."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from loopsway.indexer import Index
from loopsway.service import Settings
from loopsway.service.admission import Admission, Stage
from loopsway.service.errors import QueueFullError
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import to_tensor
from serving import QUERIES, Served

EXAMPLE = pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(QUERIES[0]))], k=3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets so many seconds pass."""
    now = [100.0]
    monkeypatch.setattr("loopsway.service.admission.time.monotonic", lambda: now[0])

    def passing(seconds: float) -> None:
        now[0] += seconds

    return passing


def done(stage: Stage, count: int, seconds: float, clock: Callable[[float], None]) -> None:
    with stage.doing(count):
        clock(seconds)


def test_what_waits_is_expected_to_take_as_long_as_what_was_done_last(clock: Callable[[float], None]) -> None:
    stage = Stage(num_places=2)
    stage.num_waiting = 12
    assert stage.expected_s == 0, "nothing is known yet"
    done(stage, 3, 1.5, clock)
    assert stage.expected_s == pytest.approx(12 * 0.5 / 2)
    for _ in range(100):
        done(stage, 4, 0.4, clock)
    assert stage.expected_s == pytest.approx(12 * 0.1 / 2, rel=1e-3), "an old pace is forgotten"
    done(stage, 32, 32 * 0.2, clock)
    assert stage.expected_s == pytest.approx(12 * 10 / 68 / 2, rel=1e-3), "9 tenths of 40 at 0.1 s, and 32 at 0.2"
    stage.forget()
    assert stage.expected_s == 0


def test_what_is_under_way_counts_once_it_takes_longer_than_it_used_to(clock: Callable[[float], None]) -> None:
    stage = Stage(num_places=1)
    stage.num_waiting = 10
    done(stage, 1, 0.1, clock)
    before = stage.expected_s
    with stage.doing(1):
        assert stage.expected_s == before == pytest.approx(1.0), "it was begun just now"
        clock(5)
        during = stage.expected_s
        assert during == pytest.approx(10 * (0.9 * 0.1 + 5) / 1.9)
    assert stage.expected_s == pytest.approx(during)
    with pytest.raises(ZeroDivisionError), stage.doing(1):
        clock(60 / 0)
    assert stage.expected_s == pytest.approx(during), "what failed says nothing"


def test_requests_are_let_in_while_what_is_before_them_takes_no_longer_than_promised(
    clock: Callable[[float], None],
) -> None:
    admission = Admission("any", Settings(max_wait_s=2.0, max_waiting=100, retry_after_s=0.25, search_threads=2))
    done(admission.stages["sketch"], 1, 0.5, clock)
    done(admission.stages["rank"], 1, 0.1, clock)
    work: dict[Any, int] = {"sketch": 2, "rank": 2}  # a second and, in two threads, a tenth
    with ExitStack() as stack:
        places = [stack.enter_context(admission.place(work, has_thread=True)) for _ in range(3)]
        with pytest.raises(QueueFullError, match=r"work for 3.0 s before this, expected at most 2 s") as caught:
            stack.enter_context(admission.place({"sketch": 1}, has_thread=True))
        assert caught.value.retry_after_s == pytest.approx(1.0)
        with pytest.raises(QueueFullError, match=r"3.3 s") as caught:
            stack.enter_context(admission.place(work, has_thread=False))
        places += [stack.enter_context(admission.place({"rank": 1}, has_thread=False))]  # the model is not in its way
        places[0].passed(admission.stages["sketch"])
        places += [stack.enter_context(admission.place(work, has_thread=True))]
        assert [place.number for place in places] == [1, 2, 3, 4, 5]
        assert admission.num_admitted == 5
    assert admission.num_admitted == 0
    assert all(stage.num_waiting == 0 for stage in admission.stages.values())


def test_a_wait_that_would_be_too_long_is_resource_exhausted_and_says_when_to_come_back(
    serve: Callable[..., Served], index: Index, sketches: np.ndarray
) -> None:
    served = serve(max_wait_s=1.5, retry_after_s=0.1)
    served.gate.hold()
    first = served.stub.FindInfluences.future(EXAMPLE)
    served.gate.wait_until_entered()
    time.sleep(1)
    served.gate.open()
    assert first.result(60).results  # an example takes a second, as far as the server knows
    served.gate.hold()
    try:
        under_way = served.stub.FindInfluences.future(EXAMPLE)
        served.gate.wait_until_entered()
        waiting = served.stub.FindInfluences.future(EXAMPLE)
        with pytest.raises(grpc.RpcError) as caught:
            served.stub.FindInfluences(EXAMPLE)
        sketch = pb.Sketch(fingerprint=index.fingerprint, values=to_tensor(sketches[0]))
        assert served.stub.FindInfluences(pb.FindInfluencesRequest(queries=[pb.Query(sketch=sketch)])).results
    finally:
        served.gate.open()
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    call: Any = caught.value  # gRPC's errors are calls too
    status, retry = rpc_status.from_call(call), error_details_pb2.RetryInfo()
    assert status is not None
    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() >= 500, "two seconds of work, of which 1.5 may wait"
    assert [each.result(60).results for each in (under_way, waiting)]
    assert served.engine.num_admitted == 0
