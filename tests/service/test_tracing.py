"""Requests as spans of OpenTelemetry, in the trace that the caller names."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from loopsway.service import Settings
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from serving import QUERIES, asked_for, running, wait_for, without_model

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
METADATA = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "traced"))
NAME = "loopsway.v1.Attribution/FindInfluences"


@contextmanager
def stub_of(settings: Settings, provider: TracerProvider | None = None) -> Iterator[AttributionStub]:
    with (
        running(settings, provider) as (_, port),
        grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel,
    ):
        yield AttributionStub(channel)


def test_a_request_is_a_span_of_its_callers_trace_and_its_parts_are_spans_within(
    index_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    request = pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(QUERIES[0]))])
    with stub_of(Settings(indices=[asked_for(index_path)], port=0, grace_s=0), provider) as stub:
        stub.FindInfluences(request, metadata=METADATA)
        with pytest.raises(grpc.RpcError):
            stub.FindInfluences(pb.FindInfluencesRequest(k=-1))
        wait_for(lambda: len(roots(exporter.get_finished_spans())) == 2)
    spans = exporter.get_finished_spans()
    root, other = roots(spans)
    assert root.parent is not None
    assert root.context is not None
    assert other.context is not None
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    assert dict(root.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "loopsway.v1.Attribution",
        "rpc.method": "FindInfluences",
        "rpc.grpc.status_code": 0,
        "loopsway.request_id": "traced",
        "loopsway.index": "tiny",
        "loopsway.query_count": 1,
    }
    within = [span for span in spans if span.parent is not None and span.parent.span_id == root.context.span_id]
    assert [span.name for span in within] == ["queue", "sketch", "queue", "search", "encode", "encode"]
    for span in within:
        assert times(root)[0] <= times(span)[0] <= times(span)[1] <= times(root)[1]
    assert f"{other.context.trace_id:032x}" != TRACE
    assert other.status.status_code is StatusCode.UNSET, "a wrong request is no fault of the server"
    (fields,) = [each.fields for each in caplog.records if getattr(each, "fields", {}).get("request_id") == "traced"]  # pyright: ignore[reportAttributeAccessIssue]
    assert fields["trace_id"] == TRACE


def roots(spans: tuple[ReadableSpan, ...]) -> list[ReadableSpan]:
    return [span for span in spans if span.name == NAME]


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.start_time, span.end_time


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes spans in, as a collector does."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.requests.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()


def test_spans_go_where_the_standard_variables_say(index_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    try:
        settings = Settings(indices=[without_model(index_path)], port=0, grace_s=0, tracing=True)
        with stub_of(settings) as stub:
            stub.GetIndex(pb.GetIndexRequest(), metadata=METADATA)
        # What was not sent yet is sent when the server ends.
        (resource,) = [each for request in collector.requests for each in request.resource_spans]
        names = {span.name for scope in resource.scope_spans for span in scope.spans}
        assert names == {"loopsway.v1.Attribution/GetIndex", "encode"}
        assert "loopsway" in {each.value.string_value for each in resource.resource.attributes}
    finally:
        server.stop(0)


def test_without_tracing_nothing_of_it_is_imported(index_path: Path) -> None:
    code = (
        "import sys; from loopsway.service import Settings, check_settings, server; "
        "check_settings(Settings(indices=[{'path': sys.argv[1], 'model': False}])); "
        "print([n for n in sys.modules if 'opentelemetry' in n])"
    )
    done = subprocess.run([sys.executable, "-c", code, index_path], check=True, capture_output=True, text=True)
    assert done.stdout == "[]\n"
