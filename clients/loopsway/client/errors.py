"""What can go wrong, as a small tree of exceptions.

LoopswayError
├── InvalidQueryError (ValueError)       the request is wrong; `.field` names the part
├── NotFoundError (LookupError)          no such index or example
├── AuthenticationError                  the server knows no such token, or wants one
├── PermissionDeniedError (PermissionError)  the token does not allow this
├── FailedPreconditionError              right in form, but not for this index (fingerprint, no model)
├── UnavailableError (ConnectionError)   no server answers, after retries, or not now; `.retry_after_s` if it says when
├── OverloadedError                      too many requests, in all or with the token; ask again after `.retry_after_s`
├── DeadlineError (TimeoutError)         no answer within `timeout_s`
└── ServerError                          the server failed; its log says why
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import grpc

from loopsway.v1 import attribution_pb2 as pb

from .details import retry_delay_s, violated_field

DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"
# gRPC's core writes this itself, with the status that we use for a full queue.
TOO_LARGE = "message larger than max"


class LoopswayError(Exception):
    """Any failure of a call.

    Attributes:
        field: the request's field at fault, such as `queries[0].sketch.values`. None when no field is.
        request_id: of the call in the server's log. None when no server answered.
    """

    def __init__(self, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.request_id: str | None = None


class InvalidQueryError(LoopswayError, ValueError):
    """The request is wrong in itself: no server would answer it."""


class NotFoundError(LoopswayError, LookupError):
    """The server has no index, or the index no example, of that name."""


class FailedPreconditionError(LoopswayError):
    """The request can't be answered by this index as it is served now."""


class AuthenticationError(LoopswayError):
    """The server wants a token, or does not know the one that came."""


class PermissionDeniedError(LoopswayError, PermissionError):
    """The token does not allow this, or not for this index."""


class UnavailableError(LoopswayError, ConnectionError):
    """No server answers at the target, or it lacks for now what it needs to answer.

    Attributes:
        retry_after_s: seconds after which the server asks to be tried again. None: none answered, or it didn't say.
    """

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, field=field)
        self.retry_after_s = retry_after_s


class OverloadedError(LoopswayError):
    """The server has more requests waiting than it admits, or got more than the token allows.

    Attributes:
        retry_after_s: seconds after which the server asks to be tried again. None: it didn't say.
    """

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, field=field)
        self.retry_after_s = retry_after_s


class DeadlineError(LoopswayError, TimeoutError):
    """The answer did not come in time."""


class ServerError(LoopswayError):
    """The server failed in a way that is not the caller's doing."""


_PLAIN: dict[grpc.StatusCode, type[LoopswayError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidQueryError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
}


def error_from_rpc(failure: grpc.RpcError, target: str) -> LoopswayError:
    """The exception for a failed call to the server at `target`."""
    # Pairs, in the blocking and the asyncio library alike, though under two types.
    metadata = dict(cast("Iterable[tuple[str, str | bytes]]", failure.trailing_metadata() or ()))
    status, request_id = metadata.get(DETAILS_KEY), metadata.get(REQUEST_ID_KEY)
    error = _error(failure, status if isinstance(status, bytes) else b"", target)
    if isinstance(request_id, str):
        error.request_id = request_id
        if isinstance(error, ServerError):
            error.args = (f"{error}, under request_id {request_id}",)
    return error


def _error(failure: grpc.RpcError, status: bytes, target: str) -> LoopswayError:
    code, text = failure.code(), failure.details() or "no details"
    if code in _PLAIN:
        field = violated_field(status)
        return _PLAIN[code](text if field is None else f"{field}: {text}", field=field)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _exhausted(text, retry_delay_s(status))
    if code is grpc.StatusCode.UNAVAILABLE and (delay := retry_delay_s(status)) is not None:
        return _unavailable(text, delay)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return UnavailableError(
            f"no Loopsway server answers at {target}: start one (`loopsway serve --index PATH`) or check the target. "
            f"gRPC says: {text}"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"{target} did not answer in time; raise timeout_s or send fewer queries in one call")
    return ServerError(f"the server at {target} failed ({code.name}): {text}; its log says why")


def error_from_failure(failure: pb.Failure, request_id: str) -> LoopswayError:
    """The exception for a batch that the stream of this id did not answer."""
    error = _batch_error(failure, request_id)
    error.request_id = request_id
    return error


def _batch_error(failure: pb.Failure, request_id: str) -> LoopswayError:
    code = next((each for each in grpc.StatusCode if cast("tuple[int, str]", each.value)[0] == failure.code), None)
    if code in _PLAIN:
        text = f"{failure.field}: {failure.message}" if failure.field else failure.message
        return _PLAIN[code](text, field=failure.field or None)
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(failure.message, failure.retry_delay.ToMilliseconds() / 1000)
    return ServerError(
        f"the server failed ({code.name if code else failure.code}): {failure.message}; its log says why, under "
        f"request_id {request_id}"
    )


def _unavailable(text: str, retry_after_s: float) -> UnavailableError:
    return UnavailableError(f"{text}; ask again in {retry_after_s:g} s", retry_after_s=retry_after_s)


def _exhausted(text: str, retry_after_s: float | None) -> LoopswayError:
    if retry_after_s is not None:
        return OverloadedError(f"{text}; ask again in {retry_after_s:g} s", retry_after_s=retry_after_s)
    if TOO_LARGE in text:
        return InvalidQueryError(f"{text}; send fewer queries or ask for fewer examples in one call")
    return OverloadedError(f"{text}; ask again later")
