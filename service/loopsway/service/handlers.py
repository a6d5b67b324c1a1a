"""gRPC's handlers of methods, with something around them."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import grpc

MOST_HANDLERS = 128  # that an interceptor keeps: a server has one for each method

Around = Callable[[Any], AbstractAsyncContextManager[None]]


def wrapped(
    handler: Any,
    around: Around,
    *,
    received: Callable[[Any], Awaitable[Any]] | None = None,
    serializer: Callable[[Any], bytes] | None = None,
) -> Any:
    """A handler that does the same within `around(context)`.

    Args:
        handler: of any of the four kinds.
        around: called with the request's context.
        received: gives what the handler takes for the bytes, or the stream of them, that came. None: gRPC parses them.
        serializer: of answers, in place of the handler's own.
    """
    kind = "_".join("stream" if each else "unary" for each in (handler.request_streaming, handler.response_streaming))
    inner: Any = getattr(handler, kind)

    async def given(came: Any) -> Any:
        return came if received is None else await received(came)

    async def plain(came: Any, context: Any) -> Any:
        async with around(context):
            return await inner(await given(came), context)

    async def streaming(came: Any, context: Any) -> AsyncIterator[Any]:
        async with around(context):
            async for response in inner(await given(came), context):
                yield response

    make = getattr(grpc, f"{kind}_rpc_method_handler")
    return make(
        streaming if inspect.isasyncgenfunction(inner) else plain,
        request_deserializer=handler.request_deserializer if received is None else None,
        response_serializer=serializer or handler.response_serializer,
    )
