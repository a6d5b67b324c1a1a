"""Scores, neighbors and sketches over gRPC are those of the index in this process, through both clients."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from loopsway.client import AsyncClient, Client, ExampleQuery, IdQuery, InvalidQueryError, NotFoundError, SketchQuery
from loopsway.indexer import ExampleSketcher, Index, find_neighbors
from loopsway.service import stretches
from loopsway.v1 import attribution_pb2 as pb
from serving import QUERIES, Served

from .test_refusals import refusal

ROUNDING = 1e-5


@pytest.fixture
def client(served: Served) -> Client:
    return Client(served.target)


def as_queries(sketches: np.ndarray, index: Index) -> list[SketchQuery]:
    return [SketchQuery(values, index.fingerprint) for values in sketches]


@pytest.mark.parametrize("resolve", ["query_step", "train_step", "same_step"])
@pytest.mark.parametrize("most", [stretches.MOST_EXAMPLES, 7])
def test_scores_are_those_of_the_mean_query_in_order(
    client: Client, index: Index, sketches: np.ndarray, resolve: Any, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stretches, "MOST_EXAMPLES", most)
    chunks = list(client.score_examples(as_queries(sketches[:3], index), resolve=resolve))
    assert max(len(chunk.example_ids) for chunk in chunks) == min(most, index.num_examples)
    scores = index.scores(sketches[:3].mean(0), resolve)
    for place, step in enumerate(scores.steps):
        own = [chunk for chunk in chunks if chunk.step == step]
        ids = [example_id for chunk in own for example_id in chunk.example_ids]
        order = np.argsort(-scores.influences[0, place], kind="stable")
        assert ids == [index.example(int(row)).id for row in scores.rows[order]]
        assert [chunk.first_rank for chunk in own] == list(range(1, index.num_examples + 1, most))
        influences = np.concatenate([chunk.influences for chunk in own])
        np.testing.assert_allclose(influences, scores.influences[0, place][order], rtol=1e-5, atol=1e-7)
        errors = np.concatenate([chunk.standard_errors for chunk in own])
        np.testing.assert_allclose(errors, scores.standard_errors[0, place][order], rtol=1e-5)
        significant = np.concatenate([chunk.significant for chunk in own])
        np.testing.assert_array_equal(significant, np.abs(influences) > 2 * errors)
    assert [chunk.step for chunk in chunks] == sorted(
        (chunk.step for chunk in chunks), key=lambda step: -1 if step is None else step
    )


def test_shares_magnitudes_and_filters_bound_each_ranking(client: Client, index: Index, sketches: np.ndarray) -> None:
    (query,) = as_queries(sketches[:1], index)
    everything = [chunk for chunk in client.score_examples([query]) if chunk.step is None]
    ids, influences = everything[0].example_ids, everything[0].influences
    top, bottom = [
        chunk for chunk in client.score_examples([query], top_share=0.1, bottom_share=0.05) if chunk.step is None
    ]
    count = index.num_examples
    assert (top.example_ids, top.first_rank) == (ids[: -(-count // 10)], 1)
    least = -(-count // 20)
    assert (bottom.example_ids, bottom.first_rank) == (ids[-least:], count - least + 1)
    magnitude = float(np.median(np.abs(influences)))
    strong = [c for c in client.score_examples([query], least_magnitude=magnitude) if c.step is None]
    expected = [each for each, value in zip(ids, influences, strict=True) if abs(value) >= magnitude]
    assert [each for chunk in strong for each in chunk.example_ids] == expected
    some = [chunk for chunk in client.score_examples([query], where="row < 9") if chunk.step is None]
    assert sorted(some[0].example_ids) == [f"tiny-{row}" for row in range(9)]
    none = list(client.score_examples([query], where="row < 0"))
    assert [(chunk.step, chunk.example_ids) for chunk in none] == [(None, ()), (0, ()), (1, ()), (2, ())]


def test_some_steps_can_be_scored_and_others_do_not_exist(client: Client, index: Index, sketches: np.ndarray) -> None:
    (query,) = as_queries(sketches[:1], index)
    whole = {chunk.step: chunk for chunk in client.score_examples([query])}
    for chunk in (some := list(client.score_examples([query], steps=[2, 0]))):
        assert chunk.example_ids == whole[chunk.step].example_ids
        np.testing.assert_array_equal(chunk.influences, whole[chunk.step].influences)
    assert [chunk.step for chunk in some] == [None, 0, 2]
    with pytest.raises(InvalidQueryError, match="step 3 does not exist; expected 0 to 2") as caught:
        list(client.score_examples([query], steps=[3]))
    assert caught.value.field == "steps"
    with pytest.raises(InvalidQueryError, match="leave it None for all"):
        list(client.score_examples([query], steps=[]))


def test_examples_are_scored_like_their_sketches(client: Client, index: Index, sketches: np.ndarray) -> None:
    examples = list(client.score_examples([ExampleQuery(query) for query in QUERIES]))
    as_sketches = list(client.score_examples(as_queries(sketches, index)))
    for one, other in zip(examples, as_sketches, strict=True):
        scale = np.abs(other.influences).max()
        np.testing.assert_allclose(one.influences, other.influences, rtol=ROUNDING, atol=ROUNDING * scale)


def test_the_first_message_alone_tells_of_the_queries(served: Served) -> None:
    request = pb.ScoreExamplesRequest(queries=[pb.Query(example_id="tiny-3")])
    messages = list(served.stub.ScoreExamples(request))
    assert [len(message.queries) for message in messages] == [1, 0, 0, 0]
    assert messages[0].queries[0].step_count == 3
    assert len(messages[0].queries[0].losses) == 2
    with Client(served.target) as client:
        chunks = list(client.score_examples([IdQuery("tiny-3")]))
    assert [[query.num_steps for query in chunk.queries] for chunk in chunks] == [[3], [], [], []]
    facts = {(chunk.index, chunk.generation, chunk.fingerprint) for chunk in chunks}
    assert facts == {("tiny", 1, served.engine.index.fingerprint)}


def test_a_reader_that_stops_leaves_the_server_well(client: Client, served: Served) -> None:
    for _ in range(3):
        for chunk in client.score_examples([IdQuery("tiny-1")]):
            assert chunk.step is None
            break
    assert served.engine.num_admitted == 0
    client.get_index()


WRONG_SCORES: dict[str, tuple[dict[str, Any], str, str]] = {
    "resolve": ({"resolve": pb.RESOLVE_MODE_STEP_MATRIX}, "resolve", "has no ranking"),
    "no queries": ({"queries": []}, "queries", "expected at least one"),
    "filter": ({"where": "rows < 3"}, "where", "no column 'rows'"),
    "top": ({"top_share": 0.0}, "top_share", "top_share is 0.0, expected above 0 and at most 1"),
    "bottom": ({"bottom_share": 1.5}, "bottom_share", "bottom_share is 1.5"),
    "NaN": ({"top_share": float("nan")}, "top_share", "top_share is nan"),
    "magnitude": ({"least_magnitude": -1.0}, "least_magnitude", "expected a finite number >= 0"),
}


@pytest.mark.parametrize("case", WRONG_SCORES)
def test_wrong_scores_are_refused_by_their_field(served: Served, case: str) -> None:
    parts, field, text = WRONG_SCORES[case]
    fields: dict[str, Any] = {"queries": [pb.Query(example_id="tiny-0")]} | parts
    request = pb.ScoreExamplesRequest(**fields)
    code, named, said = refusal(lambda: list(served.stub.ScoreExamples(request)))
    assert (code, named) == (grpc.StatusCode.INVALID_ARGUMENT, field)
    assert text in said


def test_queries_of_unequal_steps_have_no_mean(client: Client) -> None:
    queries = [ExampleQuery(QUERIES[0] | {"num_steps": steps}) for steps in (2, 3)]
    with pytest.raises(InvalidQueryError, match=r"different numbers of steps, \[2, 3\], and no mean"):
        list(client.score_examples(queries))


@pytest.mark.parametrize("by", ["cosine", "inner_product"])
@pytest.mark.parametrize("step", [None, 1])
def test_neighbors_are_those_of_the_index(client: Client, index: Index, by: Any, step: int | None) -> None:
    ids = ["tiny-3", "tiny-40"]
    found = client.find_neighbors(ids, k=5, by=by, step=step, where="row < 45")
    for mine, expected in zip(found, find_neighbors(index, ids, 5, by=by, step=step, where="row < 45"), strict=True):
        assert tuple(each.example_id for each in mine.neighbors) == expected.example_ids
        assert [each.similarity for each in mine.neighbors] == expected.similarities.tolist()
        assert [each.standard_error for each in mine.neighbors] == expected.standard_errors.tolist()
        assert mine.neighbors[0].description == index.example(int(expected.rows[0])).description
        assert mine.neighbors[0].metadata["row"] == int(expected.rows[0])
        facts = (mine.coverage, mine.index, mine.generation, mine.fingerprint)
        assert facts == (1, "tiny", 1, index.fingerprint)
    assert [each.example_id for each in found] == ids
    limit = (found[0].neighbors[1].similarity + found[0].neighbors[2].similarity) / 2
    (near,) = client.find_neighbors(ids[:1], k=5, by=by, step=step, threshold=limit, where="row < 45")
    assert near.neighbors == found[0].neighbors[:2]


WRONG_NEIGHBORS: dict[str, tuple[dict[str, Any], grpc.StatusCode, str, str]] = {
    "unknown": ({"example_ids": ["x"]}, grpc.StatusCode.NOT_FOUND, "example_ids[0]", "'x'"),
    "none": ({"example_ids": []}, grpc.StatusCode.INVALID_ARGUMENT, "example_ids", "0 example ids, expected 1 to 64"),
    "many": ({"example_ids": ["tiny-1"] * 65}, grpc.StatusCode.INVALID_ARGUMENT, "example_ids", "65 example_ids"),
    "k": ({"k": 0}, grpc.StatusCode.INVALID_ARGUMENT, "k", "k is 0"),
    "step": ({"step": 3}, grpc.StatusCode.INVALID_ARGUMENT, "step", "step 3 does not exist; expected 0 to 2"),
    "similarity": ({"similarity": 9}, grpc.StatusCode.INVALID_ARGUMENT, "similarity", "no Similarity"),
    "threshold": ({"threshold": float("inf")}, grpc.StatusCode.INVALID_ARGUMENT, "threshold", "a finite number"),
    "filter": ({"where": "("}, grpc.StatusCode.INVALID_ARGUMENT, "where", "filter"),
}


@pytest.mark.parametrize("case", WRONG_NEIGHBORS)
def test_wrong_neighbors_are_refused_by_their_field(served: Served, case: str) -> None:
    parts, code, field, text = WRONG_NEIGHBORS[case]
    fields: dict[str, Any] = {"example_ids": ["tiny-1"]} | parts
    request = pb.FindNeighborsRequest(**fields)
    found, named, said = refusal(lambda: served.stub.FindNeighbors(request))
    assert (found, named) == (code, field)
    assert text in said


def test_sketched_queries_answer_as_the_examples_do(
    client: Client, index: Index, sketcher: ExampleSketcher, sketches: np.ndarray
) -> None:
    queries = [*(ExampleQuery(query) for query in QUERIES), *as_queries(sketches[:1], index)]
    sketched = client.sketch_queries(queries)
    assert {each.fingerprint for each in sketched} == {index.fingerprint}
    summaries = [each.summary for each in sketched if each.summary is not None]
    assert [(each.num_steps, len(each.losses)) for each in summaries] == [(3, 2)] * len(QUERIES) + [(3, 0)]
    for each, expected in zip(sketched, [*sketches, sketches[0]], strict=True):
        np.testing.assert_allclose(
            np.asarray(each.values), expected, rtol=ROUNDING, atol=ROUNDING * np.abs(expected).max()
        )
    direct, again = (client.find_influences(each, k=3) for each in (queries, sketched))
    for one, other in zip(direct, again, strict=True):
        assert [each.example_id for each in one.total.proponents] == [
            each.example_id for each in other.total.proponents
        ]


def test_a_server_lists_its_indices(client: Client) -> None:
    assert client.list_indices() == [client.get_index()]


async def test_the_async_client_gives_the_same(served: Served, client: Client) -> None:
    query = IdQuery("tiny-5")
    async with AsyncClient(served.target) as other:
        chunks = [chunk async for chunk in other.score_examples([query], top_share=0.5)]
        neighbors, infos = await other.find_neighbors(["tiny-1"], k=3), await other.list_indices()
        (sketch,) = await other.sketch_queries([query])
        with pytest.raises(NotFoundError, match="'none'"):
            await other.find_neighbors(["none"])
        with pytest.raises(InvalidQueryError, match="no column"):
            async for _ in other.score_examples([query], where="rows < 3"):
                pass
    expected = await asyncio.to_thread(lambda: list(client.score_examples([query], top_share=0.5)))
    assert [(chunk.step, chunk.example_ids) for chunk in chunks] == [(each.step, each.example_ids) for each in expected]
    assert neighbors == await asyncio.to_thread(client.find_neighbors, ["tiny-1"], k=3)
    assert infos == await asyncio.to_thread(client.list_indices)
    (same,) = await asyncio.to_thread(client.sketch_queries, [query])
    np.testing.assert_allclose(np.asarray(sketch.values), np.asarray(same.values), rtol=ROUNDING, atol=1e-4)


def test_wrong_arguments_are_told_before_a_server_is_asked() -> None:
    with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidQueryError, match="by is 'angle', expected one of cosine, inner_product"):
            client.find_neighbors(["a"], by="angle")  # type: ignore[arg-type]
        with pytest.raises(InvalidQueryError, match=r"example_ids is one string; write \['a'\]"):
            client.find_neighbors("a")
        with pytest.raises(InvalidQueryError, match="queries is one query"):
            next(client.score_examples(IdQuery("a")))  # type: ignore[arg-type]


def test_an_answer_that_is_too_large_is_refused(serve: Callable[..., Served]) -> None:
    served = serve(max_message_bytes=20_000)
    queries = [pb.Query(example_id=f"tiny-{row}") for row in range(20)]
    code, field, said = refusal(lambda: served.stub.SketchQueries(pb.SketchQueriesRequest(queries=queries)))
    assert (code, field) == (grpc.StatusCode.INVALID_ARGUMENT, "queries")
    assert "expected at most 20000: ask for less in one request" in said
