"""Refusals as gRPC statuses. The only file that knows status codes.

InvalidFieldError: INVALID_ARGUMENT. UnknownNameError: NOT_FOUND. PreconditionError: FAILED_PRECONDITION.
QueueFullError and RateError: RESOURCE_EXHAUSTED, UnavailableError: UNAVAILABLE, all with RetryInfo.
StalledError: DEADLINE_EXCEEDED. UnknownCallerError: UNAUTHENTICATED. ForbiddenError: PERMISSION_DENIED. Anything else
is ours: INTERNAL, logged, nothing of it in the text.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from loopsway.v1 import attribution_pb2 as pb

from .errors import (
    ForbiddenError,
    InvalidFieldError,
    PreconditionError,
    QueueFullError,
    RateError,
    RequestError,
    StalledError,
    UnavailableError,
    UnknownCallerError,
    UnknownNameError,
)
from .record import note

_CODES: dict[type[RequestError], grpc.StatusCode] = {
    InvalidFieldError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownNameError: grpc.StatusCode.NOT_FOUND,
    PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    QueueFullError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RateError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StalledError: grpc.StatusCode.DEADLINE_EXCEEDED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    UnknownCallerError: grpc.StatusCode.UNAUTHENTICATED,
    ForbiddenError: grpc.StatusCode.PERMISSION_DENIED,
}
# An error travels in HTTP/2 headers, three times and encoded; gRPC drops the whole answer beyond 8 KiB of them.
MAX_TEXT_BYTES = 1000
# A caller whose deadline is over says so before the server's own clock does.
EARLY_S = 0.05
INTERNAL = "internal error; the server's log has the details"


def code_of(error: RequestError) -> grpc.StatusCode:
    return _CODES[type(error)]


def code_after_abort(context: Any) -> str:
    """The name of the status that a request was refused with."""
    return context.code().name


def code_of_cancelled(context: Any) -> str:
    """The name of the status that the caller sees of a request that was ended from outside."""
    left = context.time_remaining()
    return (grpc.StatusCode.CANCELLED if left is None or left > EARLY_S else grpc.StatusCode.DEADLINE_EXCEEDED).name


async def refuse_as_internal(context: Any) -> NoReturn:
    await _abort(context, grpc.StatusCode.INTERNAL, INTERNAL)


async def refuse(context: Any, error: RequestError) -> NoReturn:
    text = shortened(str(error))
    details: list[Message] = []
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=text)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if (delay := _retry_delay(error)) is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    code = code_of(error)
    note(refused_field=error.field)
    status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=text, details=_packed(details)))
    await _abort(context, code, text, status.trailing_metadata)


def failure_of(error: RequestError) -> pb.Failure:
    """What a stream says of a batch that it refuses."""
    return pb.Failure(
        code=code_of(error).value[0],
        message=shortened(str(error)),
        field=error.field,
        retry_delay=_retry_delay(error),
    )


def internal_failure() -> pb.Failure:
    return pb.Failure(code=grpc.StatusCode.INTERNAL.value[0], message=INTERNAL)


def _retry_delay(error: RequestError) -> Duration | None:
    if not isinstance(error, QueueFullError | RateError | UnavailableError):
        return None
    delay = Duration()
    delay.FromMilliseconds(round(error.retry_after_s * 1000))
    return delay


async def _abort(context: Any, code: grpc.StatusCode, text: str, trailing_metadata: Any = ()) -> NoReturn:
    # abort replaces what was set before.
    await context.abort(code, text, trailing_metadata=(*(context.trailing_metadata() or ()), *trailing_metadata))
    raise AssertionError("abort raises")


def _packed(details: Sequence[Message]) -> list[AnyMessage]:
    packed = [AnyMessage() for _ in details]
    for message, detail in zip(packed, details, strict=True):
        message.Pack(detail)
    return packed


def shortened(text: str) -> str:
    data = text.encode("utf-8", "replace")
    cut = data[:MAX_TEXT_BYTES].decode("utf-8", "ignore")  # what JSON brought may hold halves of surrogate pairs
    return cut if len(data) <= MAX_TEXT_BYTES else cut + "..."


def refusing_handler(error: RequestError) -> Any:
    """A handler that refuses any call, and reads nothing of it."""

    async def handle(_requests: AsyncIterator[bytes], context: Any) -> None:
        await refuse(context, error)

    return grpc.stream_stream_rpc_method_handler(handle)
