"""Spans of requests and of their parts, by OpenTelemetry; the only file that knows it, for the extra `otel`.

Where they go, the standard variables OTEL_EXPORTER_OTLP_... say; a request belongs to the trace of its `traceparent`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import grpc
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, format_trace_id, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .record import PartName, Record

SERVICE = "loopsway.v1.Attribution"
# Codes that are the server's fault, as OpenTelemetry's conventions for gRPC have it.
FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


class Tracing:
    """Makes spans.

    Args:
        provider: that they go to, and which its owner shuts down. None: an exporter over OTLP.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._own = _exporting() if provider is None else None
        self._tracer = (provider or self._own or TracerProvider()).get_tracer("loopsway.service")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, record: Record, metadata: Mapping[str, str]) -> Span:
        """The span of a request, in the trace that its metadata names."""
        return self._tracer.start_span(
            f"{SERVICE}/{record.method}",
            context=self._propagator.extract(dict(metadata)),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": record.method,
                        "loopsway.request_id": record.request_id},
            start_time=_epoch_ns(record.start_ns),
        )  # fmt: skip

    def part(self, span: Span, name: PartName, start_ns: int, end_ns: int) -> None:
        """A span within a request's; times by `time.monotonic_ns()`."""
        child = self._tracer.start_span(name, context=set_span_in_context(span), start_time=_epoch_ns(start_ns))
        child.end(_epoch_ns(end_ns))

    def end(self, span: Span, record: Record) -> str:
        """Ends the span of a request; gives the id of its trace."""
        span.set_attributes(
            {
                "rpc.grpc.status_code": grpc.StatusCode[record.code].value[0],
                "loopsway.index": record.index,
                "loopsway.query_count": record.num_queries,
            }
        )
        if record.code in FAULTS:
            span.set_status(StatusCode.ERROR, record.code)
        span.end()
        return format_trace_id(span.get_span_context().trace_id)

    def stop(self) -> None:
        """Sends what is not sent yet; may take seconds."""
        if self._own is not None:
            self._own.shutdown()


def _exporting() -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    named = Resource({SERVICE_NAME: "loopsway"}).merge(OTELResourceDetector().detect())  # which OTEL_SERVICE_NAME is in
    provider = TracerProvider(resource=named)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


def _epoch_ns(monotonic_ns: int) -> int:
    return monotonic_ns + time.time_ns() - time.monotonic_ns()
