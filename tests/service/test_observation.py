"""What is known of requests afterwards: metrics, the log, and the ids that tie them to the caller."""

from __future__ import annotations

import json
import logging
import re
import time
import urllib.request
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from loopsway.client import AsyncClient, Client, ExampleQuery, InvalidQueryError, NotFoundError, ServerError
from loopsway.service import Settings, SettingsError, check_settings, create_server
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from loopsway.v1.tensors import to_tensor
from serving import QUERIES, Served, wait_for, without_model

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]
SECRET = "the-patient-has"


@pytest.fixture(scope="module")
def observed(serve: Callable[..., Served]) -> Served:
    return serve(metrics_port=0)


def example(obj: Any) -> pb.Query:
    return pb.Query(example_json=json.dumps(obj))


def samples(served: Served) -> Samples:
    with urllib.request.urlopen(f"http://127.0.0.1:{served.server.metrics_port}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, frozenset(labels.items())), 0.0)


def refused(call: Callable[[], Any]) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value


def request_id_of(call: Any) -> str:
    return dict(call.trailing_metadata())["x-request-id"]


def test_requests_and_their_parts_are_counted_by_index_method_and_code(observed: Served) -> None:
    before = samples(observed)
    sketch = pb.Sketch(fingerprint=observed.engine.index.fingerprint, values=to_tensor(np.ones((3, 256), np.float32)))
    observed.stub.FindInfluences(pb.FindInfluencesRequest(queries=[example(QUERIES[0]), example(QUERIES[1])]))
    observed.stub.FindInfluences(pb.FindInfluencesRequest(index="tiny", queries=[pb.Query(sketch=sketch)]))
    refused(lambda: observed.stub.FindInfluences(pb.FindInfluencesRequest(k=-1)))
    wait_for(lambda: value(samples(observed), "loopsway_requests_in_flight") == 0)
    after = samples(observed)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    of = {"index": "tiny", "method": "FindInfluences"}
    assert grown("loopsway_requests_total", **of, code="OK") == 2
    assert grown("loopsway_requests_total", **of, code="INVALID_ARGUMENT") == 1
    assert grown("loopsway_request_seconds_count", **of, code="OK") == 2
    assert grown("loopsway_queries_total", **of) == 3
    parts = {part: grown("loopsway_part_seconds_count", **of, part=part)
             for part in ("queue", "sketch", "search", "encode")}  # fmt: skip
    # A sketch waits for a thread alone, an example for a batch too; an answer is made and then serialized.
    assert parts == {"queue": 3, "sketch": 1, "search": 2, "encode": 4}
    seconds = sum(grown("loopsway_part_seconds_sum", **of, part=part) for part in parts)
    assert 0 < seconds <= grown("loopsway_request_seconds_sum", **of, code="OK")
    assert grown("loopsway_response_bytes_total", method="FindInfluences") > 1000


def test_each_batch_of_a_stream_is_counted_with_its_own_index_and_code(
    observed: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = samples(observed)

    def batch(num_queries: int = 1, **fields: Any) -> pb.StreamInfluencesRequest:
        request = pb.FindInfluencesRequest(queries=[example(QUERIES[0])] * num_queries, **fields)
        return pb.StreamInfluencesRequest(request=request)

    batches = [batch(2), batch(index="nobody"), batch(3), batch(index="tiny", where="wrong ="), batch(index="nobody")]
    assert len(list(observed.stub.StreamInfluences(iter(batches), metadata=(("x-request-id", "stream"),)))) == 5
    fields = access(caplog, "stream")
    after = samples(observed)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("loopsway_batches_total", index="tiny", code="OK") == 2
    assert grown("loopsway_batches_total", index="tiny", code="INVALID_ARGUMENT") == 1
    assert grown("loopsway_batches_total", index="", code="NOT_FOUND") == 2
    assert grown("loopsway_queries_total", index="tiny", method="StreamInfluences") == 6
    assert grown("loopsway_queries_total", index="", method="StreamInfluences") == 0
    assert grown("loopsway_requests_total", index="", method="StreamInfluences", code="OK") == 1
    assert grown("loopsway_part_seconds_count", index="tiny", method="StreamInfluences", part="sketch") == 3
    assert (fields["batches"], fields["failed_batches"], fields["queries"], fields["code"]) == (5, 3, 6, "OK")
    assert "index" not in fields


def test_what_a_caller_names_is_no_label(observed: Served) -> None:
    for name in ("nobody", "x" * 200):
        assert (
            refused(lambda name=name: observed.stub.GetIndex(pb.GetIndexRequest(index=name))).code()
            == grpc.StatusCode.NOT_FOUND
        )
    unknown = observed.channel.unary_unary("/loopsway.v1.Attribution/Nothing")
    assert refused(lambda: unknown(b"")).code() == grpc.StatusCode.UNIMPLEMENTED
    wait_for(lambda: value(samples(observed), "loopsway_requests_total", index="", method="other",
                           code="UNIMPLEMENTED") == 1)  # fmt: skip
    found = samples(observed)
    assert value(found, "loopsway_requests_total", index="", method="GetIndex", code="NOT_FOUND") == 2
    assert {dict(labels).get("index") for _, labels in found} == {None, "", "tiny"}


def test_the_state_is_looked_up_when_somebody_asks(observed: Served) -> None:
    found = samples(observed)
    assert value(found, "loopsway_info", version=metadata.version("loopsway")) == 1
    assert value(found, "loopsway_index_generation", index="tiny") == 1
    assert value(found, "loopsway_index_examples", index="tiny") == 48
    assert value(found, "loopsway_models_resident") == 2
    assert value(found, "loopsway_model_bytes") == 2 * 4 * sum((7 * 8, 8 * 8 + 8, 8 + 8, 8 * 8 + 8, 8 * 7 + 7))
    starts = value(found, "loopsway_model_process_starts_total")
    request = pb.FindInfluencesRequest(queries=[example(QUERIES[0])])
    assert observed.stub.FindInfluences(request).results  # from then on it is known how long one takes
    observed.gate.hold()
    running = observed.stub.FindInfluences.future(request)
    observed.gate.wait_until_entered()
    waiting = observed.stub.FindInfluences.future(request)
    wait_for(lambda: value(samples(observed), "loopsway_queries_waiting", index="tiny") == 1)
    found = samples(observed)
    assert value(found, "loopsway_requests_admitted", index="tiny") == 2
    assert value(found, "loopsway_requests_in_flight") == 2
    time.sleep(0.2)
    wait_s = observed.engine.expected_wait_s
    assert value(samples(observed), "loopsway_expected_wait_seconds", index="tiny") >= wait_s > 0
    worker = observed.server.catalog.worker
    observed.gate.open()
    assert running.result(30).results
    assert waiting.result(30).results
    found = samples(observed)
    assert value(found, "loopsway_requests_admitted", index="tiny") == 0
    assert value(found, "loopsway_expected_wait_seconds", index="tiny") == 0
    assert worker.num_starts == starts >= 1


def test_the_sizes_of_batches_are_counted_by_index(observed: Served) -> None:
    def counted() -> dict[str, float]:
        found = samples(observed)
        bounds: list[dict[str, str]] = [{}, {}, *({"le": each} for each in ("1.0", "2.0", "4.0", "+Inf"))]
        kinds = ["_sum", "_count", *["_bucket"] * 4]
        return {
            kind + label.get("le", ""): value(found, f"loopsway_batch_examples{kind}", index="tiny", **label)
            for kind, label in zip(kinds, bounds, strict=True)
        }

    request = pb.FindInfluencesRequest(queries=[example(QUERIES[0])])
    before = counted()
    observed.gate.hold()
    alone = observed.stub.FindInfluences.future(request)
    observed.gate.wait_until_entered()
    together = [observed.stub.FindInfluences.future(request) for _ in range(3)]
    wait_for(lambda: value(samples(observed), "loopsway_queries_waiting", index="tiny") == 3)
    observed.gate.open()
    assert all(call.result(30).results for call in (alone, *together))
    after = counted()
    grown = {name: after[name] - before[name] for name in after}
    assert grown == {"_sum": 4, "_count": 2, "_bucket1.0": 1, "_bucket2.0": 1, "_bucket4.0": 2, "_bucket+Inf": 2}


def test_a_request_has_the_id_that_its_caller_gave_it_or_one_of_the_servers(observed: Served) -> None:
    def asked(*given: str) -> str:
        metadata = tuple(("x-request-id", each) for each in given)
        _, call = observed.stub.GetIndex.with_call(pb.GetIndexRequest(), metadata=metadata)
        return request_id_of(call)

    assert asked("job-7/eval:3") == "job-7/eval:3"
    made = asked()
    assert re.fullmatch(r"[0-9a-f]{16}", made)
    assert asked() != made
    for wrong in ("", "x" * 129, "two words", 'a"b'):
        assert re.fullmatch(r"[0-9a-f]{16}", asked(wrong)), wrong
    error = refused(
        lambda: observed.stub.GetIndex(pb.GetIndexRequest(index="no"), metadata=(("x-request-id", "mine"),))
    )
    assert request_id_of(error) == "mine"


async def test_the_clients_name_their_calls_and_their_errors_tell_the_name(
    observed: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    query = ExampleQuery(QUERIES[0])
    with Client(observed.target) as client:
        client.find_influences([query], request_id="a")
        assert len(list(client.stream_influences([query] * 3, batch=2, request_id="b"))) == 3
        assert list(client.score_examples([query], request_id="c"))
        with pytest.raises(NotFoundError) as caught:
            client.get_index("none", request_id="d")
        assert caught.value.request_id == "d"
        with pytest.raises(NotFoundError) as caught:
            client.get_index("none")
        made = caught.value.request_id
        assert made
        with pytest.raises(ServerError) as failed:
            client.find_influences([ExampleQuery({**QUERIES[0], "num_steps": 13})], request_id="e")
        assert str(failed.value).endswith("its log says why, under request_id e")
        for wrong in ("", "two words", "x" * 129, "ä"):
            with pytest.raises(InvalidQueryError, match=r"request_id is .*, expected 1 to 128 letters"):
                client.list_indices(request_id=wrong)
    async with AsyncClient(observed.target) as client:
        await client.sketch_queries([query], request_id="f")
        assert len([each async for each in client.stream_influences([query], request_id="g")]) == 1
        with pytest.raises(NotFoundError) as caught:
            await client.find_neighbors(["none"], request_id="h")
        assert caught.value.request_id == "h"
    lines = {each: access(caplog, each) for each in (*"abcdefgh", made)}
    assert [line["method"] for line in lines.values()] == [
        *("FindInfluences", "StreamInfluences", "ScoreExamples", "GetIndex", "FindInfluences"),
        *("SketchQueries", "StreamInfluences", "FindNeighbors", "GetIndex"),
    ]
    assert [line["code"] for line in lines.values()] == [
        *("OK", "OK", "OK", "NOT_FOUND", "INTERNAL", "OK", "OK", "NOT_FOUND", "NOT_FOUND")
    ]
    assert [lines[each]["queries"] for each in "abc"] == [1, 3, 1]
    traceback = next(record for record in caplog.records if record.exc_info and record.name.endswith("servicer"))
    assert "secret: /etc/weights" in str(traceback.exc_info), "the log has what the caller is not told"


def access(caplog: pytest.LogCaptureFixture, request_id: str) -> dict[str, Any]:
    """The fields of a request's line, which is written just after its answer was sent."""

    def found() -> list[dict[str, Any]]:
        lines = [vars(record)["fields"] for record in caplog.records if record.name == "loopsway.access"]
        return [fields for fields in lines if fields["request_id"] == request_id]

    wait_for(found)
    (fields,) = found()
    return fields


def test_each_request_is_one_line_of_the_log(observed: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    request = pb.FindInfluencesRequest(queries=[example(QUERIES[0])])
    start = time.monotonic()
    observed.stub.FindInfluences(request, metadata=(("x-request-id", "one"),))
    elapsed = time.monotonic() - start
    fields = access(caplog, "one")
    parts = ("queue_seconds", "sketch_seconds", "search_seconds", "encode_seconds")
    assert 0 < sum(fields[part] for part in parts) <= fields["seconds"] <= elapsed + 0.1
    assert (fields["method"], fields["index"], fields["code"], fields["queries"]) == ("FindInfluences", "tiny", "OK", 1)
    assert fields["request_bytes"] == request.ByteSize()
    refused(lambda: observed.stub.FindInfluences(pb.FindInfluencesRequest(k=-1), metadata=(("x-request-id", "two"),)))
    fields = access(caplog, "two")
    assert (fields["code"], fields["field"]) == ("INVALID_ARGUMENT", "k")
    stub: Any = health_pb2_grpc.HealthStub(observed.channel)
    stub.Check(health_pb2.HealthCheckRequest(), metadata=(("x-request-id", "probe"),))
    observed.stub.GetIndex(pb.GetIndexRequest(), metadata=(("x-request-id", "after"),))
    access(caplog, "after")
    assert "probe" not in caplog.text, "probes come every few seconds, and would drown the rest"


def test_a_request_that_nobody_waits_for_is_logged_as_what_its_caller_saw(
    observed: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    request = pb.FindInfluencesRequest(queries=[example(QUERIES[0])])
    observed.gate.hold()
    try:
        late = refused(lambda: observed.stub.FindInfluences(request, timeout=0.5, metadata=(("x-request-id", "late"),)))
        assert late.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert access(caplog, "late")["code"] == "DEADLINE_EXCEEDED"
        gone = observed.stub.FindInfluences.future(request, metadata=(("x-request-id", "gone"),))
        wait_for(lambda: observed.engine.num_admitted)
        gone.cancel()
        assert access(caplog, "gone")["code"] == "CANCELLED"
    finally:
        observed.gate.open()
    wait_for(lambda: value(samples(observed), "loopsway_requests_in_flight") == 0)


def test_metrics_are_off_by_default_and_on_loopback_unless_asked_otherwise(served: Served, index_path: Path) -> None:
    assert served.server.metrics_port is None
    settings = Settings(indices=[without_model(index_path)], port=0, metrics_port=0, metrics_host="0.0.0.0")
    for check in (check_settings, create_server):
        with pytest.raises(SettingsError, match=r"metrics_host 0\.0\.0\.0 is not loopback"):
            check(settings)
    assert check_settings(settings.model_copy(update={"metrics_insecure_bind": True}))


async def test_a_taken_port_for_metrics_is_an_error_that_names_it(observed: Served, index_path: Path) -> None:
    taken = observed.server.metrics_port
    settings = Settings(indices=[without_model(index_path)], port=0, metrics_port=taken)
    with pytest.raises(OSError, match=f"metrics can't be had on 127.0.0.1:{taken}"):
        create_server(settings)


def test_json_lines_hold_the_parts_and_nothing_that_a_caller_wrote(
    index_path: Path, tmp_path: Path, json_child: Callable[..., Any]
) -> None:
    with json_child(index_path, tmp_path) as (stub, process):
        assert isinstance(stub, AttributionStub)
        wrong = [{"tokens": SECRET}, {"tokens": {SECRET: 1}}, {SECRET: SECRET}, SECRET, {"tokens": 7, "note": SECRET}]
        for obj in wrong:
            assert SECRET in repr(obj)
            refused(lambda obj=obj: stub.FindInfluences(pb.FindInfluencesRequest(queries=[example(obj)])))
        good = {**QUERIES[0], "note": SECRET}
        stub.FindInfluences(pb.FindInfluencesRequest(queries=[example(good)]), metadata=(("x-request-id", "good"),))
        for request in (
            pb.FindInfluencesRequest(queries=[example(good)], where=f'name == "{SECRET}'),
            pb.FindInfluencesRequest(queries=[pb.Query(example_id=SECRET)]),
            pb.FindInfluencesRequest(queries=[pb.Query(example_json=f'{{"{SECRET}')]),
            pb.FindInfluencesRequest(index=SECRET),
        ):
            refused(lambda request=request: stub.FindInfluences(request))
        process.terminate()
        _, errors = process.communicate(timeout=60)
    lines = [json.loads(line) for line in errors.splitlines()]
    assert SECRET not in errors
    answered = [line for line in lines if line["logger"] == "loopsway.access"]
    assert len(answered) == 10
    (line,) = [line for line in answered if line["request_id"] == "good"]
    assert {"time", "level", "message", "queue_seconds", "sketch_seconds", "search_seconds"} <= line.keys()
    assert any("example_from_json failed without a ValueError: TypeError at" in line["message"] for line in lines)
