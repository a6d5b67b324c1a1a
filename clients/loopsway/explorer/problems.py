"""Failures as problem documents (RFC 9457), with the client's own text."""

from __future__ import annotations

import re
from http import HTTPStatus
from math import ceil
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from loopsway.client import (
    AuthenticationError,
    DeadlineError,
    FailedPreconditionError,
    InvalidQueryError,
    LoopswayError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    UnavailableError,
)

_STATUS: dict[type[LoopswayError], HTTPStatus] = {
    InvalidQueryError: HTTPStatus.BAD_REQUEST,
    NotFoundError: HTTPStatus.NOT_FOUND,
    AuthenticationError: HTTPStatus.FORBIDDEN,  # the explorer's own token, not the browser's
    PermissionDeniedError: HTTPStatus.FORBIDDEN,
    FailedPreconditionError: HTTPStatus.CONFLICT,
    OverloadedError: HTTPStatus.TOO_MANY_REQUESTS,
    UnavailableError: HTTPStatus.SERVICE_UNAVAILABLE,
    DeadlineError: HTTPStatus.GATEWAY_TIMEOUT,
}
_POSITION = re.compile(r"\bcharacter (\d+)")


def problem(status: HTTPStatus, detail: str, **members: Any) -> Response:
    """The document; members that are None are left out."""
    known = {name: value for name, value in members.items() if value is not None}
    return JSONResponse(
        {"title": status.phrase, "status": status.value, "detail": detail} | known,
        status.value,
        media_type="application/problem+json",
    )


async def of_client(_request: Request, error: Exception) -> Response:
    """A failure of the gRPC server's, or what the client refused itself.

    `position` is the character, from 1, at which a filter or a query can't be read.
    """
    assert isinstance(error, LoopswayError)
    status = next((_STATUS[kind] for kind in type(error).__mro__ if kind in _STATUS), HTTPStatus.BAD_GATEWAY)
    position = _POSITION.search(str(error)) if error.field in ("where", "query") else None
    response = problem(status, str(error), field=error.field, position=position and int(position[1]))
    if isinstance(error, OverloadedError) and error.retry_after_s is not None:
        response.headers["Retry-After"] = str(ceil(error.retry_after_s))
    return response


async def of_http(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return problem(HTTPStatus(error.status_code), error.detail)
