"""What a request can be refused for. refusals.py gives each its status code; nothing here knows gRPC.

RequestError
├── InvalidFieldError (ValueError)    wrong in itself
├── UnknownNameError (LookupError)    no such index or example
├── PreconditionError (RuntimeError)  right in form, but not for this index as it is served
├── StalledError (TimeoutError)       a stream's client was not in time
├── UnknownCallerError                no token, or one that is not known
├── ForbiddenError (PermissionError)  the token does not allow this
├── RateError (RuntimeError)          the token's requests come too fast
├── QueueFullError (RuntimeError)     too many requests are waiting
└── UnavailableError (RuntimeError)   what the server needs for this is down, and will be up again
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class RequestError(Exception):
    """A refused request.

    Attributes:
        field: the request's field at fault, in the proto's names, such as `queries[0].sketch.values`; "" for none.
    """

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class InvalidFieldError(RequestError, ValueError):
    """A field's value is wrong for any server."""


class UnknownNameError(RequestError, LookupError):
    """A field names an index or an example that is not here."""


class PreconditionError(RequestError, RuntimeError):
    """The index, as it is served now, can't answer this."""


class StalledError(RequestError, TimeoutError):
    """A stream's client did not send, or take, the next message in time."""


class QueueFullError(RequestError, RuntimeError):
    """The index has as many requests waiting as it admits.

    Attributes:
        retry_after_s: when to ask again.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnknownCallerError(RequestError):
    """The request brings no token that the server knows."""


class ForbiddenError(RequestError, PermissionError):
    """The caller's token does not allow this."""


class RateError(RequestError, RuntimeError):
    """More requests with one token than it allows.

    Attributes:
        retry_after_s: when to ask again.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@contextmanager
def in_field(outer: str) -> Iterator[None]:
    """Names the fields of what is refused as fields of a message inside another."""
    try:
        yield
    except RequestError as error:
        error.field = f"{outer}.{error.field}" if error.field else outer
        raise


class UnavailableError(RequestError, RuntimeError):
    """The model is not loaded yet, its process died under the request or has too little memory for it now; or shards
    did not answer.

    Attributes:
        retry_after_s: when to ask again.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
