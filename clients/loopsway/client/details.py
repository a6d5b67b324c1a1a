"""The two details of a google.rpc.Status that the client reads: the field at fault, and when to come back.

Read by field number (google/rpc/status.proto, google/rpc/error_details.proto; the numbers never change), because the
package that has these messages' classes would be one more requirement of every client.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet

# Status.details = 3, each an Any: type_url = 1, value = 2.
STATUS_DETAILS, ANY_TYPE, ANY_VALUE = 3, 1, 2
# BadRequest.field_violations = 1, each with field = 1.
BAD_REQUEST, VIOLATIONS, VIOLATION_FIELD = b"google.rpc.BadRequest", 1, 1
# RetryInfo.retry_delay = 1, a Duration: seconds = 1, nanos = 2.
RETRY_INFO, RETRY_DELAY, DURATION_SECONDS, DURATION_NANOS = b"google.rpc.RetryInfo", 1, 1, 2

_Value = TypeVar("_Value", bytes, int)


def violated_field(status: bytes) -> str | None:
    """The field that a serialized Status blames first. None: it blames none."""
    for request in _details(status, BAD_REQUEST):
        for violation in _values(request, VIOLATIONS, bytes):
            for field in _values(violation, VIOLATION_FIELD, bytes):
                return field.decode("utf-8", "replace")
    return None


def retry_delay_s(status: bytes) -> float | None:
    """After how many seconds a serialized Status asks to be tried again. None: it doesn't say."""
    for info in _details(status, RETRY_INFO):
        for delay in _values(info, RETRY_DELAY, bytes):
            seconds, nanos = _values(delay, DURATION_SECONDS, int), _values(delay, DURATION_NANOS, int)
            return next(seconds, 0) + next(nanos, 0) / 1e9
    return None


def _details(status: bytes, name: bytes) -> Iterator[bytes]:
    for packed in _values(status, STATUS_DETAILS, bytes):
        type_url = next(_values(packed, ANY_TYPE, bytes), b"")
        if type_url.rpartition(b"/")[2] == name:
            yield next(_values(packed, ANY_VALUE, bytes), b"")


def _values(data: bytes, number: int, kind: type[_Value]) -> Iterator[_Value]:
    """Each value of one field of a serialized message. Nothing at all of a damaged message."""
    try:
        # To Empty every field is an unknown one, and protobuf keeps those.
        fields = UnknownFieldSet(Empty.FromString(data))
    except DecodeError:
        return
    for field in fields:
        if field.field_number == number and isinstance(field.data, kind):
            yield field.data
