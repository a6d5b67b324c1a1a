"""Every wrong request gets the right status code, and the field at fault by its name."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from loopsway.indexer import Index
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import to_tensor
from serving import QUERIES, Served, wait_for

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
PRECONDITION, EXHAUSTED = grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED
GOOD = pb.Query(example_json=json.dumps(QUERIES[0]))


def refusal(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str, str]:
    """The status code, the field and the text that a call is refused with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value  # gRPC's errors are calls too
    status = rpc_status.from_call(error)
    field = ""
    for detail in status.details if status else ():
        request = error_details_pb2.BadRequest()
        if detail.Unpack(request):
            field = request.field_violations[0].field
    return error.code(), field, error.details()


def sketch(values: np.ndarray, fingerprint: str, **tensor: Any) -> pb.Query:
    message = to_tensor(values)
    parts = {"data_type": message.data_type, "shape": message.shape, "data": message.data} | tensor
    return pb.Query(sketch=pb.Sketch(fingerprint=fingerprint, values=pb.Tensor(**parts)))


def with_value(value: float) -> np.ndarray:
    values = np.ones((3, 256), np.float32)
    values[1, 7] = value
    return values


VALUES = np.ones((3, 256), np.float32)
WRONG_SKETCHES: dict[str, tuple[dict[str, Any], str]] = {
    "width": ({"values": np.ones((3, 128), np.float32)}, "shape is [3, 128], expected [any, 256]"),
    "rank": ({"values": np.ones(256, np.float32)}, "shape is [256], expected [any, 256]"),
    "dtype": ({"values": np.ones((3, 256), np.float64)}, "data_type is float64, expected float32"),
    "no steps": ({"values": np.ones((0, 256), np.float32)}, "the sketch has 0 steps, expected 1 to"),
    "NaN": ({"values": with_value(np.nan)}, "value [1, 7] is nan, expected finite numbers"),
    "infinity": ({"values": with_value(-np.inf)}, "value [1, 7] is -inf, expected finite numbers"),
    "too few bytes": ({"values": VALUES, "data": b"1234"}, "data has 4 bytes, expected 3072"),
    "no type": ({"values": VALUES, "data_type": 0}, "data_type is 0"),
    "negative length": ({"values": VALUES, "shape": [-3, 256]}, "expected no negative length"),
    "huge shape": ({"values": VALUES, "shape": [2**40, 256]}, "expected at most"),
}


@pytest.mark.parametrize("case", WRONG_SKETCHES)
def test_a_wrong_sketch_is_an_invalid_argument(served: Served, index: Index, case: str) -> None:
    parts, text = WRONG_SKETCHES[case]
    request = pb.FindInfluencesRequest(queries=[GOOD, sketch(fingerprint=index.fingerprint, **parts)])
    code, field, said = refusal(lambda: served.stub.FindInfluences(request))
    assert (code, field) == (INVALID, "queries[1].sketch.values")
    assert text in said


def test_another_fingerprint_is_a_failed_precondition_that_names_both(served: Served, index: Index) -> None:
    request = pb.FindInfluencesRequest(queries=[sketch(VALUES, "cafe")])
    code, field, said = refusal(lambda: served.stub.FindInfluences(request))
    assert (code, field) == (PRECONDITION, "queries[0].sketch.fingerprint")
    assert "cafe" in said
    assert index.fingerprint in said


WRONG_QUERIES: dict[str, tuple[pb.Query, grpc.StatusCode, str, str]] = {
    "nothing": (pb.Query(), INVALID, "queries[1]", "expected example_json, example_id or sketch"),
    "no JSON": (pb.Query(example_json="{"), INVALID, "queries[1].example_json", "not JSON"),
    "empty JSON": (pb.Query(example_json=""), INVALID, "queries[1].example_json", "not JSON"),
    "NaN": (pb.Query(example_json='{"tokens": NaN}'), INVALID, "queries[1].example_json", "NaN is no JSON number"),
    "deep JSON": (pb.Query(example_json="[" * 10**5), INVALID, "queries[1].example_json", "is 100000 arrays"),
    "no example": (
        pb.Query(example_json='{"tokens": [9, 9, 9, 9, 9, 9]}'),
        INVALID,
        "queries[1].example_json",
        "expected 6 whole numbers from 0 to 6",
    ),
    "another object": (pb.Query(example_json='{"bits": 1}'), INVALID, "queries[1].example_json", "could not read"),
    "another type": (pb.Query(example_json="7"), INVALID, "queries[1].example_json", "could not read"),
    "no steps": (
        pb.Query(example_json=json.dumps(QUERIES[0] | {"num_steps": 0})),
        INVALID,
        "queries[1].example_json",
        "can't run this example",
    ),
    "unknown id": (pb.Query(example_id="tiny-48"), NOT_FOUND, "queries[1].example_id", "'tiny-48'"),
    "empty id": (pb.Query(example_id=""), NOT_FOUND, "queries[1].example_id", "''"),
}


@pytest.mark.parametrize("case", WRONG_QUERIES)
@pytest.mark.parametrize("method", ["FindInfluences", "GetTrajectories"])
def test_a_wrong_query_is_named(served: Served, case: str, method: str) -> None:
    query, code, field, text = WRONG_QUERIES[case]
    request: Any = pb.FindInfluencesRequest(queries=[GOOD, query])
    if method == "GetTrajectories":
        request = pb.GetTrajectoriesRequest(queries=[GOOD, query], example_ids=["tiny-0"])
    got = refusal(lambda: getattr(served.stub, method)(request))
    assert got[:2] == (code, field)
    assert text in got[2]


WRONG_REQUESTS: dict[str, tuple[dict[str, Any], grpc.StatusCode, str, str]] = {
    "unknown index": ({"index": "nope"}, NOT_FOUND, "index", "no index 'nope', only tiny"),
    "no queries": ({"queries": []}, INVALID, "queries", "expected at least one"),
    "too many queries": ({"queries": [GOOD] * 65}, INVALID, "queries", "65 queries, expected at most 64"),
    "k = 0": ({"k": 0}, INVALID, "k", "k is 0, expected 1 to 1000"),
    "k < 0": ({"k": -1}, INVALID, "k", "k is -1"),
    "k over the limit": ({"k": 1001}, INVALID, "k", "k is 1001"),
    "unknown mode": ({"resolve": 99}, INVALID, "resolve", "resolve is 99"),
    "the matrix": ({"resolve": pb.RESOLVE_MODE_STEP_MATRIX}, INVALID, "resolve", "has no ranking"),
    "negative step": ({"steps": [0, -1]}, INVALID, "steps[1]", "step is -1"),
    "repeated step": ({"steps": [0, 1, 0]}, INVALID, "steps[2]", "step 0 is named twice"),
    "step beyond the loop": ({"steps": [3]}, INVALID, "steps", "expected 0 to 2"),
}


@pytest.mark.parametrize("case", WRONG_REQUESTS)
def test_a_wrong_request_is_named(served: Served, case: str) -> None:
    change, code, field, text = WRONG_REQUESTS[case]
    fields: dict[str, Any] = {"queries": [GOOD]} | change
    request = pb.FindInfluencesRequest(**fields)
    got = refusal(lambda: served.stub.FindInfluences(request))
    assert got[:2] == (code, field)
    assert text in got[2]


def test_same_step_with_another_number_of_steps_names_both(served: Served, index: Index) -> None:
    request = pb.FindInfluencesRequest(
        queries=[sketch(VALUES[:2], index.fingerprint)], resolve=pb.RESOLVE_MODE_SAME_STEP
    )
    code, field, said = refusal(lambda: served.stub.FindInfluences(request))
    assert (code, field) == (INVALID, "resolve")
    assert "the index has 3 and the query 2" in said


def test_wrong_trajectory_requests_are_named(served: Served, index: Index) -> None:
    def asked(**change: Any) -> tuple[grpc.StatusCode, str, str]:
        fields: dict[str, Any] = {"queries": [GOOD], "example_ids": ["tiny-0"]} | change
        request = pb.GetTrajectoriesRequest(**fields)
        return refusal(lambda: served.stub.GetTrajectories(request))

    assert asked(example_ids=["tiny-0", "x"])[:2] == (NOT_FOUND, "example_ids[1]")
    assert asked(example_ids=[])[:2] == (INVALID, "example_ids")
    assert asked(index="nope")[:2] == (NOT_FOUND, "index")
    assert asked(resolve=99)[:2] == (INVALID, "resolve")
    for case in ("negative step", "repeated step", "step beyond the loop"):
        change, code, field, text = WRONG_REQUESTS[case]
        for resolve in (pb.RESOLVE_MODE_QUERY_STEP, pb.RESOLVE_MODE_TRAIN_STEP, pb.RESOLVE_MODE_STEP_MATRIX):
            got = asked(resolve=resolve, **change)
            assert got[:2] == (code, field)
            assert text in got[2]
    two_lengths = [sketch(VALUES, index.fingerprint), sketch(VALUES[:2], index.fingerprint)]
    code, field, said = asked(queries=two_lengths)
    assert (code, field) == (INVALID, "queries")
    assert "[2, 3]" in said
    code, field, said = asked(queries=two_lengths, steps=[2])  # that one of them has
    assert (code, field) == (INVALID, "steps")
    assert "step 2 does not exist; expected 0 to 1" in said


def test_an_oversized_message_is_refused_before_it_is_read(serve: Callable[..., Served], index: Index) -> None:
    served = serve(max_message_bytes=4096)
    request = pb.FindInfluencesRequest(queries=[sketch(np.ones((9, 256), np.float32), index.fingerprint)])
    code, _, said = refusal(lambda: served.stub.FindInfluences(request))
    assert code == EXHAUSTED
    assert "larger than max" in said


def test_of_requests_that_do_not_arrive_so_many_are_waited_for_and_more_refused_unread(
    serve: Callable[..., Served], index: Index
) -> None:
    served, ended = serve(max_arriving=2), threading.Event()
    request = pb.FindInfluencesRequest(queries=[sketch(VALUES, index.fingerprint)])

    def never() -> Iterator[bytes]:
        ended.wait(60)
        yield from ()

    with grpc.insecure_channel(served.target) as channel:
        headers_only = channel.stream_unary("/loopsway.v1.Attribution/FindInfluences")
        halting = [headers_only.future(never(), timeout=60) for _ in range(2)]

        def is_crowded() -> bool:
            try:
                served.stub.FindInfluences(request)
            except grpc.RpcError as error:
                call: Any = error
                assert call.code() is EXHAUSTED
                assert "2 requests are arriving, expected at most 2 at once; ask again later" in call.details()
                return True
            return False

        wait_for(is_crowded)
        health: Any = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        halting[0].cancel()
        wait_for(lambda: not is_crowded())
        halting[1].cancel()
        ended.set()


def test_an_answer_that_would_be_oversized_is_refused_with_the_remedy(
    serve: Callable[..., Served], index: Index
) -> None:
    served = serve(max_message_bytes=6000, max_influencers=50)
    small = sketch(VALUES, index.fingerprint)
    ids = ["tiny-0"] * 300
    got = refusal(lambda: served.stub.GetTrajectories(pb.GetTrajectoriesRequest(queries=[small], example_ids=ids)))
    assert got[:2] == (INVALID, "example_ids")
    assert "are 7200 bytes, expected at most 6000: ask for fewer" in got[2]
    third = pb.GetTrajectoriesRequest(queries=[small], example_ids=ids, steps=[1])
    assert list(served.stub.GetTrajectories(third).influences.shape) == [1, 300, 1]
    got = refusal(lambda: served.stub.FindInfluences(pb.FindInfluencesRequest(queries=[small], k=8)))
    assert got[:2] == (INVALID, "k")
    assert "has 64 influencers, expected at most 50: lower k" in got[2]
    got = refusal(lambda: served.stub.FindInfluences(pb.FindInfluencesRequest(queries=[small], k=6)))
    assert got[:2] == (INVALID, "k")
    assert "expected at most 6000: ask for less" in got[2]


def test_a_failure_of_ours_is_internal_and_says_nothing_of_itself(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    bomb = pb.Query(example_json=json.dumps(QUERIES[0] | {"num_steps": 13}))
    code, field, said = refusal(lambda: served.stub.FindInfluences(pb.FindInfluencesRequest(queries=[bomb])))
    assert (code, field) == (grpc.StatusCode.INTERNAL, "")
    assert "secret" not in said
    assert "secret: /etc/weights" in caplog.text


def test_a_long_error_still_arrives(served: Served) -> None:
    request = pb.FindInfluencesRequest(queries=[pb.Query(example_id="ü" * 4000)])
    code, field, said = refusal(lambda: served.stub.FindInfluences(request))
    assert (code, field) == (NOT_FOUND, "queries[0].example_id")
    assert said.endswith("...")


def test_an_index_without_its_model_answers_sketches_only(serve: Callable[..., Served], index: Index) -> None:
    served = serve(model=False)
    assert not served.stub.GetIndex(pb.GetIndexRequest()).index.accepts_examples
    assert served.stub.FindInfluences(pb.FindInfluencesRequest(queries=[sketch(VALUES, index.fingerprint)])).results
    for query, name in ((GOOD, "example_json"), (pb.Query(example_id="tiny-0"), "example_id")):
        request = pb.FindInfluencesRequest(queries=[query])
        code, field, said = refusal(lambda request=request: served.stub.FindInfluences(request))
        assert (code, field) == (PRECONDITION, f"queries[0].{name}")
        assert "--task" in said
