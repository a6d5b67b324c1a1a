"""Streams of queries: answers in order, failures that end nothing, and no more in memory than a window."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator

import grpc
import numpy as np
import pytest

from loopsway.client import (
    AsyncClient,
    Client,
    DeadlineError,
    ExampleQuery,
    IdQuery,
    InvalidQueryError,
    LoopswayError,
    NotFoundError,
    OverloadedError,
    Query,
    ServerError,
    SketchQuery,
)
from loopsway.client.requests import query_messages
from loopsway.client.streaming import WINDOW
from loopsway.indexer import Index
from loopsway.service import stretches
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from serving import QUERIES, Served, wait_for


def queries_of(count: int) -> list[Query]:
    return [IdQuery(f"tiny-{i}") if i % 2 else ExampleQuery(QUERIES[i % len(QUERIES)]) for i in range(count)]


async def test_a_stream_answers_as_single_calls_do_and_in_order(served: Served) -> None:
    queries, told = queries_of(23), list[int]()
    with Client(served.target) as blocking:
        streamed = await asyncio.to_thread(
            lambda: list(blocking.stream_influences(queries, batch=4, k=3, on_progress=told.append))
        )
        single = [(await asyncio.to_thread(blocking.find_influences, [query], k=3))[0] for query in queries]
    assert told == [4, 8, 12, 16, 20, 23]
    for got, want in zip(streamed, single, strict=True):
        assert not isinstance(got, LoopswayError)
        assert [each.example_id for each in got.total.proponents] == [each.example_id for each in want.total.proponents]
        influences = [each.influence for each in got.total.proponents]
        np.testing.assert_allclose(influences, [each.influence for each in want.total.proponents], rtol=1e-4)

    async def asynchronous() -> AsyncIterator[Query]:
        for query in queries:
            await asyncio.sleep(0)
            yield query

    async with AsyncClient(served.target) as client:
        for source in (queries, asynchronous()):
            again = [each async for each in client.stream_influences(source, batch=4, k=3)]
            assert [_first(each) for each in again] == [_first(each) for each in streamed]


def _first(answer: object) -> str:
    assert not isinstance(answer, LoopswayError)
    return answer.total.proponents[0].example_id  # type: ignore[attr-defined]


def test_a_batch_that_fails_gives_its_error_and_the_stream_goes_on(served: Served) -> None:
    queries = [IdQuery("tiny-0"), IdQuery("tiny-1"), IdQuery("nope"), IdQuery("tiny-2"), ExampleQuery({"tokens": []})]
    queries += [IdQuery("tiny-3"), ExampleQuery(QUERIES[0] | {"num_steps": 13})]
    with Client(served.target) as client:
        answers = list(client.stream_influences(queries, batch=2, k=2))
    kinds = [type(answer).__name__ for answer in answers]
    assert kinds == ["InfluenceResult"] * 2 + ["NotFoundError"] * 2 + ["InvalidQueryError"] * 2 + ["ServerError"]
    missing = answers[2]
    assert isinstance(missing, NotFoundError)
    assert missing.field == "queries[0].example_id"
    failed = answers[-1]
    assert isinstance(failed, ServerError)
    assert "secret" not in str(failed)
    assert failed.request_id
    assert str(failed).endswith(f"its log says why, under request_id {failed.request_id}")


def test_tags_come_back_with_the_answers_and_each_batch_may_ask_otherwise(served: Served, index: Index) -> None:
    def batch(tag: str, **values: object) -> pb.StreamInfluencesRequest:
        request = pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(QUERIES[0]))], **values)  # type: ignore[arg-type]
        return pb.StreamInfluencesRequest(tag=tag, request=request)

    batches = [batch("a", k=1), batch("b", k=0), batch("c", index="other"), batch("x" * 257), batch("d", k=4)]
    answers = list(served.stub.StreamInfluences(iter(batches), timeout=60))
    assert [answer.tag for answer in answers] == ["a", "b", "c", "x" * 256, "d"]
    assert [answer.failure.code for answer in answers] == [0, 3, 5, 3, 0]
    assert [answer.failure.field for answer in answers] == ["", "k", "index", "tag", ""]
    assert len(answers[4].response.results[0].total.proponents) == 4
    assert answers[0].response.fingerprint == index.fingerprint


def endless(read: list[int], index: Index) -> Iterator[Query]:
    values = np.ones((3, 256), np.float32)
    while True:
        read.append(len(read))
        yield SketchQuery(values, index.fingerprint)


@pytest.mark.parametrize("batch", [1, 5])
def test_queries_are_read_no_further_than_a_window_ahead_of_the_answers(
    served: Served, index: Index, batch: int
) -> None:
    read: list[int] = []
    with Client(served.target) as client:
        stream = client.stream_influences(endless(read, index), batch=batch, k=1)
        for taken in range(1, 12):
            next(stream)
            assert len(read) <= taken + (WINDOW + 1) * batch
        time.sleep(0.3)  # in which it could run ahead
        assert len(read) <= 11 + (WINDOW + 1) * batch
        stream.close()  # type: ignore[attr-defined]


async def test_the_asyncio_stream_reads_no_further_than_its_window_either(served: Served, index: Index) -> None:
    read: list[int] = []
    async with AsyncClient(served.target) as client:
        stream = client.stream_influences(endless(read, index), batch=2, k=1)
        await anext(stream)
        await asyncio.sleep(0.3)
        assert len(read) <= 1 + (WINDOW + 1) * 2
        await stream.aclose()  # type: ignore[attr-defined]


def test_the_server_reads_no_more_batches_than_it_has_under_way(serve: Callable[..., Served]) -> None:
    served = serve(stream_batches=2, max_example_characters=2 << 20)
    served.gate.hold()
    sent: list[int] = []
    padding = "x" * (1 << 20)  # larger than what a connection holds

    def batches() -> Iterator[pb.StreamInfluencesRequest]:
        for i in range(200):
            sent.append(i)
            query = pb.Query(example_json=json.dumps(QUERIES[0] | {"padding": padding}))
            yield pb.StreamInfluencesRequest(request=pb.FindInfluencesRequest(queries=[query], k=1))

    call = served.stub.StreamInfluences(batches(), timeout=60)
    try:
        served.gate.wait_until_entered()
        deadline, before = time.monotonic() + 30, -1
        while len(sent) != before:  # until it stands still
            assert time.monotonic() < deadline
            before = len(sent)
            time.sleep(0.5)
        assert len(sent) < 40, "nothing holds the sender back"
    finally:
        served.gate.open()
        call.cancel()


def test_a_stream_waits_where_a_call_is_told_to_come_back(serve: Callable[..., Served]) -> None:
    served = serve(max_waiting=0, retry_after_s=0.05)
    served.gate.hold()
    held = served.stub.FindInfluences.future(
        pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(QUERIES[0]))])
    )
    served.gate.wait_until_entered()
    answers: list[object] = []
    with Client(served.target, timeout_s=60) as client:
        thread = threading.Thread(target=lambda: answers.extend(client.stream_influences(queries_of(6), batch=2)))
        thread.start()
        with pytest.raises(OverloadedError):
            client.find_influences([IdQuery("tiny-0")])
        time.sleep(0.3)
        assert not answers
        served.gate.open()
        thread.join(60)
    assert held.result(60).results
    assert len(answers) == 6
    assert not any(isinstance(answer, LoopswayError) for answer in answers)


def test_a_batch_that_takes_too_long_is_a_deadline_error_and_a_slow_source_is_none(
    serve: Callable[..., Served],
) -> None:
    served = serve()

    def slow() -> Iterator[Query]:
        yield IdQuery("tiny-0")
        time.sleep(1.2)
        yield IdQuery("tiny-1")

    with Client(served.target) as client:
        assert len(list(client.stream_influences(slow(), batch=1, timeout_s=0.8))) == 2
        served.gate.hold()
        try:
            with pytest.raises(DeadlineError, match=r"longer than 0.3 s over a batch"):
                list(client.stream_influences(queries_of(2), batch=1, timeout_s=0.3))
        finally:
            served.gate.open()


async def test_the_asyncio_stream_has_a_deadline_for_each_batch_too(serve: Callable[..., Served]) -> None:
    served = serve()
    served.gate.hold()
    try:
        async with AsyncClient(served.target) as client:
            with pytest.raises(DeadlineError, match=r"longer than 0.3 s over a batch"):
                async for _ in client.stream_influences(queries_of(2), batch=1, timeout_s=0.3):
                    pass
    finally:
        served.gate.open()


def test_a_caller_may_take_longer_over_an_answer_than_the_server_may(served: Served) -> None:
    with Client(served.target) as client:
        stream = client.stream_influences(queries_of(12), batch=1, timeout_s=1)
        next(stream)
        time.sleep(2)
        assert len(list(stream)) == 11


async def test_what_the_callers_own_queries_raise_is_raised_to_the_caller(served: Served) -> None:
    def breaking() -> Iterator[Query]:
        yield IdQuery("tiny-0")
        raise ZeroDivisionError("the caller's")

    with Client(served.target) as client:
        stream = client.stream_influences(breaking(), batch=1)
        assert _first(await asyncio.to_thread(next, stream))
        with pytest.raises(ZeroDivisionError, match="the caller's"):
            await asyncio.to_thread(next, stream)
        with pytest.raises(InvalidQueryError, match="expected an ExampleQuery"):
            list(client.stream_influences(["tiny-0"]))  # type: ignore[list-item]
        with pytest.raises(InvalidQueryError, match="batch is 0"):
            client.stream_influences([], batch=0)
        assert list(client.stream_influences([])) == []
    async with AsyncClient(served.target) as client:
        with pytest.raises(ZeroDivisionError, match="the caller's"):
            [each async for each in client.stream_influences(breaking(), batch=1)]


def test_scores_that_nobody_takes_leave_their_place(
    serve: Callable[..., Served], index: Index, sketches: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "MOST_EXAMPLES", 1)
    served = serve(model=False, stall_s=2, max_streams=1)
    query = SketchQuery(sketches[0], index.fingerprint)
    request = pb.ScoreExamplesRequest(queries=query_messages([query]))
    # So little fits on its way that most of the 192 messages wait in the server.
    options = [("grpc.enable_http_proxy", 0), ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    with grpc.insecure_channel(served.target, options=options) as channel, Client(served.target) as client:
        call = AttributionStub(channel).ScoreExamples(request)
        next(call)
        with pytest.raises(OverloadedError, match="the server has 1 streams open"):
            list(client.score_examples([query]))

        def admitted() -> bool:
            try:
                return len(list(client.score_examples([query]))) == 192
            except OverloadedError:
                return False

        wait_for(admitted)
        taken: list[object] = []
        with pytest.raises(grpc.RpcError) as caught:
            taken.extend(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(taken) < 191


def test_a_stream_that_stalls_is_ended(serve: Callable[..., Served]) -> None:
    served = serve(stall_s=0.3)
    ended = threading.Event()

    def stalling() -> Iterator[pb.StreamInfluencesRequest]:
        query = pb.Query(example_json=json.dumps(QUERIES[0]))
        yield pb.StreamInfluencesRequest(tag="only", request=pb.FindInfluencesRequest(queries=[query]))
        ended.wait(60)

    call = served.stub.StreamInfluences(stalling(), timeout=60)
    assert next(call).tag == "only"
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    ended.set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
