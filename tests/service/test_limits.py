"""Every field that can hold much has a limit, and what is beyond it is named with its size."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from loopsway.service import Settings
from loopsway.service.json_text import depth_of
from loopsway.service.limits import LIMITS, name_of
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from serving import TASK_SPEC, Served, commanded

TEXT = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)


def fields_of_requests() -> Iterator[FieldDescriptor]:
    """Every field that a request can hold, at any depth."""
    waiting: list[Descriptor] = [
        method.input_type for service in pb.DESCRIPTOR.services_by_name.values() for method in service.methods
    ]
    seen: set[str] = set()
    while waiting:
        message = waiting.pop()
        if message.full_name not in seen:
            seen.add(message.full_name)
            yield from message.fields
            waiting += [field.message_type for field in message.fields if field.message_type is not None]


def test_every_field_that_can_hold_much_has_a_limit_and_no_limit_is_left_over() -> None:
    expected = {name_of(field): field for field in fields_of_requests() if field.is_repeated or field.type in TEXT}
    assert set(LIMITS) == set(expected), "give the new field its limit in limits.py"
    for name, field in expected.items():
        assert (LIMITS[name].length is not None) == (field.type in TEXT), name
        assert (LIMITS[name].count is not None) == field.is_repeated, name


SMALL: dict[str, Any] = {
    "max_id_characters": 8,
    "max_example_characters": 100,
    "max_json_depth": 3,
    "max_where_characters": 9,
    "max_example_ids": 5,
    "max_steps": 4,
    "max_queries": 2,
}
OK = pb.Query(example_id="tiny-0")
CASES: dict[str, tuple[Any, str, str]] = {
    "queries": (pb.FindInfluencesRequest(queries=[OK] * 3), "queries", "3 queries, expected at most 2"),
    "id": (
        pb.FindInfluencesRequest(queries=[OK, pb.Query(example_id="x" * 9)]),
        "queries[1].example_id",
        "has 9 characters, expected at most 8",
    ),
    "json": (
        pb.FindInfluencesRequest(queries=[pb.Query(example_json="7" * 101)]),
        "queries[0].example_json",
        "has 101 characters, expected at most 100",
    ),
    "depth": (
        pb.FindInfluencesRequest(queries=[pb.Query(example_json='{"a": [[[1]]]}')]),
        "queries[0].example_json",
        "4 arrays and objects deep, expected at most 3",
    ),
    "where": (pb.FindInfluencesRequest(queries=[OK], where="row < 9999"), "where", "10 characters, expected at most 9"),
    "steps": (pb.FindInfluencesRequest(queries=[OK], steps=range(5)), "steps", "5 steps, expected at most 4"),
    "steps of trajectories": (
        pb.GetTrajectoriesRequest(queries=[OK], example_ids=["tiny-0"], steps=range(5)),
        "steps",
        "5 steps, expected at most 4",
    ),
    "ids": (
        pb.GetTrajectoriesRequest(queries=[OK], example_ids=["tiny-0"] * 6),
        "example_ids",
        "6 example_ids, expected at most 5",
    ),
    "one of the ids": (
        pb.GetTrajectoriesRequest(queries=[OK], example_ids=["a", "x" * 9]),
        "example_ids[1]",
        "9 characters, expected at most 8",
    ),
    "fingerprint": (
        pb.FindInfluencesRequest(queries=[pb.Query(sketch=pb.Sketch(fingerprint="a" * 129))]),
        "queries[0].sketch.fingerprint",
        "129 characters, expected at most 128",
    ),
    "shape": (
        pb.FindInfluencesRequest(queries=[pb.Query(sketch=pb.Sketch(values=pb.Tensor(shape=[1] * 9)))]),
        "queries[0].sketch.values.shape",
        "9 shape, expected at most 8",
    ),
    "index": (pb.GetIndexRequest(index="i" * 1025), "index", "1025 characters, expected at most 1024"),
}


@pytest.fixture(scope="module")
def small(serve: Callable[..., Served]) -> Served:
    return serve(**SMALL)


@pytest.mark.parametrize("case", CASES)
def test_what_is_too_much_is_named_with_its_size_and_the_limit(small: Served, case: str) -> None:
    request, field, text = CASES[case]
    method = getattr(small.stub, type(request).__name__.removesuffix("Request"))
    with pytest.raises(grpc.RpcError) as caught:
        method(request)
    error: Any = caught.value
    status: Any = rpc_status.from_call(error)
    violations = error_details_pb2.BadRequest()
    assert status.details[0].Unpack(violations)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert violations.field_violations[0].field == field
    assert text in violations.field_violations[0].description


async def test_json_that_takes_long_to_read_holds_nobody_else_up(index_path: Path, tmp_path: Path) -> None:
    """As many empty lists as a query may hold, in each of sixteen. The server's loop must not be what reads them."""
    text = "[" + "[]," * (Settings().max_example_characters // 3 - 1) + "[]]"
    request = pb.FindInfluencesRequest(queries=[pb.Query(example_json=text)] * 16)
    config = tmp_path / "serve.toml"
    config.write_text(f"port = 0\nindices = [{{path = '{index_path}', task = '{TASK_SPEC}'}}]\n")
    with commanded(config):
        target = f"127.0.0.1:{json.loads((tmp_path / 'ready.json').read_text())['port']}"
        async with grpc.aio.insecure_channel(target) as channel, grpc.aio.insecure_channel(target) as other:
            health: Any = health_pb2_grpc.HealthStub(other)
            await health.Check(health_pb2.HealthCheckRequest())
            begin, waits = time.monotonic(), list[float]()
            asking = asyncio.ensure_future(AttributionStub(channel).FindInfluences(request, timeout=300))
            while not asking.done():
                asked = time.monotonic()
                await health.Check(health_pb2.HealthCheckRequest())
                waits.append(time.monotonic() - asked)
                await asyncio.wait([asking], timeout=0.01)
            taken = time.monotonic() - begin
    error = asking.exception()
    assert isinstance(error, grpc.aio.AioRpcError)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, error
    assert "could not read this JSON" in (error.details() or "")
    assert max(waits) < taken / 3, f"the longest of {len(waits)} health checks took {max(waits):.2f} s of {taken:.2f} s"


def test_bytes_that_are_no_message_are_an_invalid_argument(served: Served) -> None:
    for method in ("loopsway.v1.Attribution/FindInfluences", "grpc.health.v1.Health/Check"):
        with pytest.raises(grpc.RpcError) as caught:
            served.channel.unary_unary(f"/{method}")(b"\xff\xff")
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "2 bytes are not the request's message" in error.details()


@pytest.mark.parametrize("value", [1, [], [[]], {"a": [{"b": "]]]}}}"}]}, ['"', "\\", ["[\\"]], {"[": {"{": 0}}])
def test_the_depth_of_json_is_that_of_what_it_says(value: Any) -> None:
    def depth(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else 1 + max(map(depth, inner), default=0)

    assert depth_of(json.dumps(value)) == depth(value)
