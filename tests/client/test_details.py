"""The client's own reading of google.rpc's error details agrees with the package that defines them."""

from __future__ import annotations

import hypothesis.strategies as st
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given

from loopsway.client.details import retry_delay_s, violated_field

DELAYS = st.integers(0, 10**6), st.integers(0, 999_999_999)


def serialized(*details: object) -> bytes:
    status = status_pb2.Status(code=3, message="no")
    for detail in details:
        packed = Any()
        packed.Pack(detail)  # type: ignore[arg-type]
        status.details.append(packed)
    return status.SerializeToString()


@given(st.text(min_size=1), *DELAYS)
def test_field_and_delay_are_found_among_other_details(field: str, seconds: int, nanos: int) -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description="is wrong")
    status = serialized(
        error_details_pb2.ErrorInfo(reason="X", domain="y"),
        error_details_pb2.BadRequest(field_violations=[violation]),
        error_details_pb2.RetryInfo(retry_delay=Duration(seconds=seconds, nanos=nanos)),
    )
    assert violated_field(status) == field
    assert retry_delay_s(status) == seconds + nanos / 1e9


def test_a_status_without_them_has_neither() -> None:
    status = serialized(error_details_pb2.ErrorInfo(reason="X", domain="y"), error_details_pb2.BadRequest())
    assert violated_field(status) is None
    assert retry_delay_s(status) is None
    assert violated_field(b"") is None


@given(st.binary(max_size=200) | st.binary(max_size=40).map(lambda data: b"\x1a" + bytes([len(data)]) + data))
def test_any_bytes_are_read_without_an_error(status: bytes) -> None:
    assert violated_field(status) is None or isinstance(violated_field(status), str)
    assert retry_delay_s(status) is None or isinstance(retry_delay_s(status), float | int)
