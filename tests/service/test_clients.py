"""The two clients against a real server: the same answers, the promised types, and errors that say what to do."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from loopsway.client import (
    AsyncClient,
    Client,
    DeadlineError,
    ExampleQuery,
    FailedPreconditionError,
    IdQuery,
    InvalidQueryError,
    LoopswayError,
    NotFoundError,
    OverloadedError,
    ServerError,
    SketchQuery,
)
from loopsway.client.options import Resolve
from loopsway.indexer import Index
from serving import QUERIES, Served


@pytest.fixture
def client(served: Served) -> Client:
    return Client(served.target)


def test_a_filter_is_searched_within(client: Client, index: Index, sketches: np.ndarray) -> None:
    where = 'row >= 5 and id != "tiny-7"'
    (result,) = client.find_influences([SketchQuery(sketches[0], index.fingerprint)], k=4, where=where)
    expected = index.search(sketches[0], k=4, where=where)
    for found, ranking in zip([result.total, *result.steps], [expected.total, *expected.steps], strict=True):
        assert [each.example_id for each in found.proponents] == list(ranking.proponents.example_ids)
        assert [each.example_id for each in found.opponents] == list(ranking.opponents.example_ids)
        assert all(each.metadata["row"] >= 5 for each in (*found.proponents, *found.opponents))
    with pytest.raises(InvalidQueryError, match=r"character 1: no column 'rows'; the columns are id, .*row") as caught:
        client.find_influences([IdQuery("tiny-0")], where="rows > 3")
    assert caught.value.field == "where"


def test_an_approximate_search_says_how_well_it_finds(client: Client, index: Index, sketches: np.ndarray) -> None:
    query = SketchQuery(sketches[0], index.fingerprint)
    ((exact,), (approximate,)) = (client.find_influences([query], k=4, exact=how) for how in (True, False))
    expected = index.search(sketches[0], k=4, exact=False)
    assert exact.recall == 1
    assert approximate.recall == expected.recall
    assert [each.example_id for each in approximate.total.proponents] == list(expected.total.proponents.example_ids)


@pytest.mark.parametrize("resolve", ["query_step", "train_step", "same_step"])
def test_each_sign_has_its_own_count_and_trajectories_come_with_the_rankings(
    client: Client, index: Index, sketches: np.ndarray, resolve: Resolve
) -> None:
    query = SketchQuery(sketches[0], index.fingerprint)
    (result,) = client.find_influences(
        [query], num_proponents=4, num_opponents=1, resolve=resolve, steps=[0, 2], trajectories=True
    )
    expected = index.search(sketches[0], k=4, resolve=resolve, steps=[0, 2])
    named: list[str] = []
    for got, want in zip([result.total, *result.steps], [expected.total, *expected.steps], strict=True):
        assert [each.example_id for each in got.proponents] == list(want.proponents.example_ids)
        assert [each.example_id for each in got.opponents] == list(want.opponents.example_ids[:1])
        named += [each.example_id for each in (*got.proponents, *got.opponents)]
    curves = result.trajectories
    assert curves is not None
    assert list(curves.example_ids) == list(dict.fromkeys(named))
    want, errors = index.trajectories_with_errors(sketches[:1], curves.example_ids, resolve)
    np.testing.assert_array_equal(curves.influences, want[0])
    np.testing.assert_array_equal(curves.standard_errors, errors[0])
    assert client.find_influences([query])[0].trajectories is None


def test_one_sign_alone_can_be_asked_for_and_none_cannot(client: Client, index: Index, sketches: np.ndarray) -> None:
    query = SketchQuery(sketches[0], index.fingerprint)
    (result,) = client.find_influences([query], num_proponents=0, k=2)
    assert [(len(each.proponents), len(each.opponents)) for each in (result.total, *result.steps)] == [(0, 2)] * 4
    (nothing,) = client.find_influences([query], where='id == "nobody"', trajectories=True)
    assert nothing.trajectories is not None
    assert nothing.trajectories.influences.shape == (0, 3)
    with pytest.raises(InvalidQueryError, match="both 0"):
        client.find_influences([query], num_proponents=0, num_opponents=0)
    with pytest.raises(InvalidQueryError, match="opponent_count is 1001, expected 0 to 1000"):
        client.find_influences([query], num_opponents=1001)


def test_results_are_those_of_the_index(served: Served, index: Index, sketches: np.ndarray) -> None:
    ids = ["tiny-1", "tiny-5"]
    with Client(served.target) as client:
        (result,) = client.find_influences([SketchQuery(sketches[0], index.fingerprint)], k=3, steps=[1])
        trajectories = client.get_trajectories(
            [SketchQuery(sketches[0], index.fingerprint)], ids, resolve="step_matrix", steps=[2, 1]
        )
    expected = index.search(sketches[0], k=3, steps=[1])
    proponents = expected.total.proponents
    assert [each.example_id for each in result.total.proponents] == list(proponents.example_ids)
    assert [each.influence for each in result.total.proponents] == proponents.influences.tolist()
    assert [each.standard_error for each in result.total.proponents] == proponents.standard_errors.tolist()
    assert (result.total.step, [ranking.step for ranking in result.steps]) == (None, [1])
    assert (result.query.num_steps, result.query.losses) == (3, ())
    assert (result.index, result.generation, result.fingerprint) == ("tiny", 1, index.fingerprint)
    first = index.example(int(proponents.rows[0]))
    assert result.total.proponents[0].description == first.description
    assert result.total.proponents[0].metadata == first.metadata | {"big": str(first.metadata["big"])}
    assert isinstance(result.total.proponents[0].metadata["row"], int)
    assert trajectories.steps == (1, 2)
    columns = index.trajectories_with_errors(sketches[0], ids, "step_matrix", [1, 2])
    np.testing.assert_array_equal(trajectories.influences, columns[0])
    np.testing.assert_array_equal(trajectories.standard_errors, columns[1])
    with pytest.raises(FrozenInstanceError):
        result.index = "other"  # type: ignore[misc]


async def test_both_clients_give_the_same_answers(served: Served, index: Index, sketches: np.ndarray) -> None:
    queries = [ExampleQuery(QUERIES[0]), IdQuery("tiny-3"), SketchQuery(sketches[1], index.fingerprint)]
    with Client(served.target) as client:
        info = await asyncio.to_thread(client.get_index)
        results = await asyncio.to_thread(client.find_influences, queries, k=4, resolve="train_step")
        trajectories = await asyncio.to_thread(
            client.get_trajectories, queries, ["tiny-0"], resolve="same_step", steps=[1]
        )
    async with AsyncClient(served.target) as client:
        assert await client.get_index("tiny") == info
        assert await client.find_influences(queries, k=4, resolve="train_step") == results
        again = await client.get_trajectories(queries, ["tiny-0"], resolve="same_step", steps=[1])
    assert again.steps == trajectories.steps == (1,)
    np.testing.assert_array_equal(again.influences, trajectories.influences)
    np.testing.assert_array_equal(again.standard_errors, trajectories.standard_errors)
    assert again.queries == trajectories.queries
    assert len(info.checkpoints) == len(results[0].query.losses) == 2
    assert (info.num_examples, info.loop_body, info.loop_marker) == (48, ("block",), None)
    assert info.recalls == {10: index.recall["recall@10"]}


def test_the_servers_refusals_are_the_promised_errors(client: Client, index: Index) -> None:
    with pytest.raises(InvalidQueryError, match=r"k: k is 0, expected 1 to 1000") as caught:
        client.find_influences([IdQuery("tiny-0")], k=0)
    assert caught.value.field == "k"
    assert isinstance(caught.value, ValueError)
    with pytest.raises(NotFoundError, match="'nope'") as caught:
        client.get_trajectories([IdQuery("tiny-0"), IdQuery("nope")], ["tiny-0"])
    assert caught.value.field == "queries[1].example_id"
    assert isinstance(caught.value, LookupError)
    with pytest.raises(FailedPreconditionError, match=index.fingerprint) as caught:
        client.find_influences([SketchQuery(np.ones((3, 256)), "cafe")])
    assert caught.value.field == "queries[0].sketch.fingerprint"
    with pytest.raises(InvalidQueryError, match="is nan") as caught:
        client.find_influences([SketchQuery(np.full((3, 256), np.nan), index.fingerprint)])
    assert caught.value.field == "queries[0].sketch.values"
    with pytest.raises(ServerError, match="its log says why"):
        client.find_influences([ExampleQuery(QUERIES[0] | {"num_steps": 13})])


async def test_the_asyncio_client_raises_the_same_errors(served: Served) -> None:
    async with AsyncClient(served.target) as client:
        with pytest.raises(NotFoundError) as caught:
            await client.find_influences([IdQuery("nope")])
        assert caught.value.field == "queries[0].example_id"
        with pytest.raises(InvalidQueryError, match="k: k is 0"):
            await client.find_influences([IdQuery("tiny-0")], k=0)


def test_a_request_or_answer_too_large_says_to_ask_for_less(
    serve: Callable[..., Served], served: Served, index: Index
) -> None:
    query = SketchQuery(np.ones((9, 256)), index.fingerprint)
    with Client(serve(max_message_bytes=4096).target) as client:
        with pytest.raises(InvalidQueryError, match="send fewer queries"):
            client.find_influences([query])
        assert client.get_index().num_examples == 48
    with Client(served.target, max_message_bytes=10_000) as client, pytest.raises(LoopswayError, match="fewer"):
        client.find_influences([query], k=24)
    with Client(serve(max_message_bytes=1000).target) as client, pytest.raises(InvalidQueryError) as caught:
        client.find_influences([IdQuery("tiny-0")], k=48, trajectories=True)
    assert caught.value.field == "include_trajectories"


def test_a_slow_answer_is_a_deadline_error_and_a_full_queue_says_when_to_come_back(
    serve: Callable[..., Served],
) -> None:
    served = serve(max_waiting=0, retry_after_s=2.5)
    served.gate.hold()
    with Client(served.target, timeout_s=60, overload_retries=0) as client:
        answers = []
        first = threading.Thread(target=lambda: answers.extend(client.find_influences([IdQuery("tiny-0")])))
        first.start()
        try:
            served.gate.wait_until_entered()
            with pytest.raises(OverloadedError, match=r"ask again in 2.5 s") as caught:
                client.find_influences([IdQuery("tiny-1")])
            assert caught.value.retry_after_s == 2.5
        finally:
            served.gate.open()
            first.join(60)
        assert len(answers) == 1
        served.gate.hold()
        start = time.monotonic()
        with pytest.raises(DeadlineError, match="raise timeout_s") as late:
            client.find_influences([IdQuery("tiny-1")], timeout_s=0.2)
        assert isinstance(late.value, TimeoutError)
        assert time.monotonic() - start < 10
        served.gate.open()


def test_several_indices_need_a_name(served: Served, client: Client) -> None:
    assert client.get_index("tiny") == client.get_index()
    with pytest.raises(NotFoundError, match="no index 'other', only tiny"):
        client.get_index("other")
