"""Every request's token, looked at before a byte of its message is read. Which index it allows, the servicer asks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Literal

import grpc
import grpc.aio

from .errors import ForbiddenError, RequestError
from .record import note
from .refusals import refusing_handler
from .tokens import CALLER, Caller, Scope, Tokens

ATTRIBUTION = "/loopsway.v1.Attribution/"
# What a method needs: a scope for the index that it names (of ListIndices, for those that it shows), or nothing, as
# whoever watches over the server has no token. A method that is not here is refused.
SCOPES: dict[str, Scope | Literal["open"]] = {
    f"{ATTRIBUTION}GetIndex": "read",
    f"{ATTRIBUTION}ListIndices": "read",
    f"{ATTRIBUTION}FindInfluences": "read",
    f"{ATTRIBUTION}StreamInfluences": "read",
    f"{ATTRIBUTION}GetTrajectories": "read",
    f"{ATTRIBUTION}ScoreExamples": "read",
    f"{ATTRIBUTION}FindNeighbors": "read",
    f"{ATTRIBUTION}SketchQueries": "read",
    f"{ATTRIBUTION}SketchGradients": "read",
    f"{ATTRIBUTION}ReloadIndex": "admin",
    "/grpc.health.v1.Health/Check": "open",
    "/grpc.health.v1.Health/Watch": "open",
    "/grpc.health.v1.Health/List": "open",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "read",
}


class Authentication(grpc.aio.ServerInterceptor):
    """Lets requests pass that bring one of the tokens."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        # The context's own type says less than gRPC gives: names and values of the request's metadata.
        details: Any = handler_call_details
        method: str = details.method
        scope = SCOPES.get(method)
        if scope == "open":
            return await continuation(handler_call_details)
        try:
            bucket = self._tokens.admit(_bearer(details.invocation_metadata))
            if scope is None:
                raise ForbiddenError("this server has no scope for the method, and lets nobody call it")
        except RequestError as error:
            return refusing_handler(error)
        CALLER.set(Caller(bucket=bucket, scope=scope))  # the handler runs in this same task
        note(token=bucket.token.name)
        return await continuation(handler_call_details)


def _bearer(metadata: Any) -> str | None:
    """The token of `authorization: Bearer TOKEN`."""
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str):
            kind, _, token = value.partition(" ")
            return token.strip() if kind.lower() == "bearer" else None
    return None
