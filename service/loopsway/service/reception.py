"""Bytes from the network to request messages: what is none, or holds too much, is refused before the servicer sees it.

A stream's messages are checked by the servicer, which can refuse one of them alone. Of a server that can't keep up more
is refused here, unread: else all that is asked would wait for messages that come in small pieces.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from .authentication import SCOPES
from .errors import InvalidFieldError, QueueFullError, RequestError
from .handlers import MOST_HANDLERS, wrapped
from .limits import check_limits
from .record import RECORD
from .refusals import refuse, refuse_as_internal, refusing_handler
from .settings import Settings

_log = logging.getLogger(__name__)


class Reception(grpc.aio.ServerInterceptor):
    """Reads every request; without it, gRPC takes bytes that are no message for a fault of the server."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._arriving = set[asyncio.Task[Any]]()  # of requests whose message is on its way
        self._receiving = lru_cache(MOST_HANDLERS)(self._receiving_anew)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        # The context's own type says less than gRPC gives.
        details: Any = handler_call_details
        if not handler.request_streaming and SCOPES.get(details.method) != "open":
            if len(self._arriving) >= self._settings.max_arriving:
                return refusing_handler(self._crowded())
            task = asyncio.current_task()
            assert task is not None, "gRPC answers each request in a task of its own"
            self._arriving.add(task)
            task.add_done_callback(self._arriving.discard)  # one that ends before its message is here
        return self._receiving(handler)

    def _receiving_anew(self, handler: Any) -> Any:
        receive = self._messages if handler.request_streaming else self._message
        return wrapped(handler, _refusing, received=partial(receive, parse=handler.request_deserializer))

    def _crowded(self) -> QueueFullError:
        return QueueFullError(
            f"{len(self._arriving)} requests are arriving, expected at most {self._settings.max_arriving} at once; ask "
            "again later",
            retry_after_s=self._settings.retry_after_s,
        )

    async def _message(self, data: bytes, parse: Callable[[bytes], Message]) -> Message:
        self._arriving.discard(asyncio.current_task())  # pyright: ignore[reportArgumentType]  # None is in no set
        message = _parsed(data, parse)
        check_limits(message, self._settings)
        return message

    async def _messages(
        self, stream: AsyncIterator[bytes], parse: Callable[[bytes], Message]
    ) -> AsyncIterator[Message]:
        async def each() -> AsyncIterator[Message]:
            async for data in stream:
                yield _parsed(data, parse)

        return each()


@asynccontextmanager
async def _refusing(context: Any) -> AsyncIterator[None]:
    """Refuses what was raised, unless the servicer did: gRPC itself would send an exception's text to the caller."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except RequestError as error:
        await refuse(context, error)
    except Exception:
        _log.exception("a request failed")
        await refuse_as_internal(context)


def _parsed(data: bytes, parse: Callable[[bytes], Message]) -> Message:
    if (record := RECORD.get()) is not None:
        record.request_bytes += len(data)
    try:
        return parse(data)
    except DecodeError as error:
        raise InvalidFieldError(
            f"{len(data)} bytes are not the request's message: {error}; is the client of another version?"
        ) from error
