"""Every request from its first byte to its last: its id, its line in the log, its metrics, its span.

The outermost interceptor, so that what the others refuse is seen too. Nothing that a caller wrote is kept but an id of
its own, and that only if it is well-formed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from .authentication import ATTRIBUTION, SCOPES
from .handlers import MOST_HANDLERS, wrapped
from .metrics import Metrics
from .record import RECORD, PartName, Record, part, request_id_from
from .refusals import code_after_abort, code_of_cancelled

if TYPE_CHECKING:
    from .tracing import Tracing

_log = logging.getLogger("loopsway.access")

REQUEST_ID = "x-request-id"


class Observation(grpc.aio.ServerInterceptor):
    """Observes requests.

    Args:
        metrics: where they are counted.
        tracing: where their spans go. None: nowhere.
    """

    def __init__(self, metrics: Metrics, tracing: Tracing | None) -> None:
        self._metrics, self._tracing = metrics, tracing
        self._observing = lru_cache(MOST_HANDLERS)(self._observing_anew)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        # The context's own type says less than gRPC gives: names and values of the request's metadata.
        details: Any = handler_call_details
        metadata = {key: value for key, value in details.invocation_metadata or () if isinstance(value, str)}
        known = details.method in SCOPES
        record = Record(
            method=details.method.removeprefix(ATTRIBUTION).removeprefix("/") if known else "other",
            request_id=request_id_from(metadata.get(REQUEST_ID)),
            metadata=metadata,
            on_part=self._on_part,
            on_batch=self._metrics.batch,
        )
        RECORD.set(record)  # the handler runs in this same task
        handler = await continuation(handler_call_details)
        if handler is None:  # gRPC answers
            record.code = grpc.StatusCode.UNIMPLEMENTED.name
            self._end(record)
            return None
        return self._observing(handler, SCOPES.get(details.method) == "open")

    def _observing_anew(self, handler: Any, is_watched: bool) -> Any:
        """The handler, observed; of what `is_watched` by probes, every few seconds, a line is told to debug alone."""
        around = partial(self._observed, is_watched=is_watched)
        return wrapped(handler, around, serializer=_noting(handler.response_serializer))

    @asynccontextmanager
    async def _observed(self, context: Any, *, is_watched: bool) -> AsyncIterator[None]:
        record = RECORD.get()
        assert record is not None, "it was set for this task, when the handler was looked up"
        # Not as initial metadata: a call whose headers were sent is never tried again by the client's gRPC.
        context.set_trailing_metadata(((REQUEST_ID, record.request_id),))
        if self._tracing is not None and not is_watched:
            record.span = self._tracing.begin(record, record.metadata)
        self._metrics.in_flight.inc()

        def end(_: Any) -> None:  # once the answer is encoded
            self._metrics.in_flight.dec()
            self._end(record, logging.DEBUG if is_watched else logging.INFO)

        context.add_done_callback(end)
        try:
            yield
            record.code = grpc.StatusCode.OK.name
        except grpc.aio.AbortError:
            record.code = code_after_abort(context)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            record.code = code_of_cancelled(context)
            raise

    def _on_part(self, record: Record, name: PartName, start_ns: int, end_ns: int) -> None:
        self._metrics.part(record, name, (end_ns - start_ns) / 1e9)
        if self._tracing is not None and record.span is not None:
            self._tracing.part(record.span, name, start_ns, end_ns)

    def _end(self, record: Record, level: int = logging.INFO) -> None:
        seconds = (time.monotonic_ns() - record.start_ns) / 1e9
        self._metrics.end(record, seconds)
        trace_id = None
        if self._tracing is not None and record.span is not None:
            trace_id = self._tracing.end(record.span, record)
        fields: dict[str, Any] = {
            "request_id": record.request_id,
            "trace_id": trace_id,
            "method": record.method,
            "index": record.index,
            "token": record.token,
            "code": record.code,
            "field": record.refused_field,
            "queries": record.num_queries,
            "batches": record.num_batches or None,
            "failed_batches": record.num_failed_batches or None,
            "request_bytes": record.request_bytes,
            "response_bytes": record.response_bytes,
            "seconds": round(seconds, 6),
            **{f"{name}_seconds": round(taken, 6) for name, taken in record.seconds.items()},
        }
        if _log.isEnabledFor(level):
            # `Logger.log` would look for the file and line that it is called from, which takes longer than the rest.
            line = logging.LogRecord(_log.name, level, __file__, 0, "%s %s", (record.method, record.code), None)
            line.fields = {key: value for key, value in fields.items() if value not in (None, "")}
            _log.handle(line)


def _noting(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    """A serializer that notes time and size."""
    if serialize is None:
        return None

    def serialized(message: Any) -> bytes:
        with part("encode"):
            data = serialize(message)
        if (record := RECORD.get()) is not None:
            record.response_bytes += len(data)
        return data

    return serialized
