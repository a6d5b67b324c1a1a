"""What comes over gRPC is what the index answers in this process."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
from google.protobuf.json_format import MessageToDict

from loopsway.indexer import ExampleSketcher, Index, Influencers, Ranked, load_task
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import from_tensor, to_tensor
from serving import QUERIES, TASK_SPEC, Served

MODES: dict[str, Any] = {
    "query_step": pb.RESOLVE_MODE_QUERY_STEP,
    "train_step": pb.RESOLVE_MODE_TRAIN_STEP,
    "same_step": pb.RESOLVE_MODE_SAME_STEP,
    "step_matrix": pb.RESOLVE_MODE_STEP_MATRIX,
}
RANKED_MODES = [mode for mode in MODES if mode != "step_matrix"]
# Another batch split may change the order of float additions; nothing else.
ROUNDING = 1e-5


def json_query(obj: object) -> pb.Query:
    return pb.Query(example_json=json.dumps(obj))


def sketch_query(index: Index, values: np.ndarray) -> pb.Query:
    return pb.Query(sketch=pb.Sketch(fingerprint=index.fingerprint, values=to_tensor(values)))


def assert_ranked(messages: Any, expected: Ranked, index: Index, tolerance: float) -> None:
    assert [message.example_id for message in messages] == list(expected.example_ids)
    for column, values in (("influence", expected.influences), ("standard_error", expected.standard_errors)):
        got = np.array([getattr(message, column) for message in messages], np.float32)
        np.testing.assert_allclose(got, values, rtol=tolerance, atol=tolerance * np.abs(values).max(initial=0))
    for message in messages:
        assert message.description == index.example(index.row_of(message.example_id)).description


def assert_ranking(message: pb.Ranking, expected: Influencers, index: Index, tolerance: float) -> None:
    assert (message.step if message.HasField("step") else None) == expected.step
    assert_ranked(message.proponents, expected.proponents, index, tolerance)
    assert_ranked(message.opponents, expected.opponents, index, tolerance)


@pytest.mark.parametrize("mode", RANKED_MODES)
@pytest.mark.parametrize("kind", ["example_json", "sketch", "example_id"])
def test_influences_are_those_of_the_index(
    served: Served, index: Index, sketcher: ExampleSketcher, sketches: np.ndarray, mode: Any, kind: str
) -> None:
    if kind == "example_id":
        rows = [5, 0, 47]
        queries = [pb.Query(example_id=f"tiny-{row}") for row in rows]
        values = sketcher.sketch([load_task(TASK_SPEC).examples()[row] for row in rows]).values.numpy()
    else:
        values = sketches
        queries = [json_query(query) for query in QUERIES]
    if kind == "sketch":
        queries = [sketch_query(index, value) for value in values]
    request = pb.FindInfluencesRequest(queries=queries, k=4, resolve=MODES[mode])
    response = served.stub.FindInfluences(request)
    assert (response.index, response.generation, response.fingerprint) == ("tiny", 1, index.fingerprint)
    expected = index.search(values, k=4, resolve=mode)
    assert len(response.results) == len(expected)
    for result, ranking in zip(response.results, expected, strict=True):
        tolerance = 0 if kind == "sketch" else ROUNDING
        assert_ranking(result.total, ranking.total, index, tolerance)
        assert len(result.steps) == len(ranking.steps) == 3
        for step, ranked in zip(result.steps, ranking.steps, strict=True):
            assert_ranking(step, ranked, index, tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_trajectories_are_those_of_the_index(served: Served, index: Index, sketches: np.ndarray, mode: Any) -> None:
    ids = ["tiny-3", "tiny-47", "tiny-3"]
    queries = [sketch_query(index, value) for value in sketches]
    request = pb.GetTrajectoriesRequest(queries=queries, example_ids=ids, resolve=MODES[mode])
    response = served.stub.GetTrajectories(request)
    for tensor, expected in (
        (response.influences, index.trajectories(sketches, ids, resolve=mode)),
        (response.standard_errors, index.standard_errors(sketches, ids, resolve=mode)),
    ):
        np.testing.assert_array_equal(from_tensor(tensor, dtype="float32", shape=expected.shape), expected)
    assert [query.step_count for query in response.queries] == [3] * 4
    assert list(response.steps) == [0, 1, 2]


@pytest.mark.parametrize("mode", MODES)
def test_trajectories_of_some_steps_are_those_of_the_whole_ascending(
    served: Served, index: Index, sketches: np.ndarray, mode: Any
) -> None:
    ids = ["tiny-3", "tiny-47"]
    queries = [sketch_query(index, value) for value in sketches]
    request = pb.GetTrajectoriesRequest(queries=queries, example_ids=ids, resolve=MODES[mode], steps=[2, 0])
    response = served.stub.GetTrajectories(request)
    assert list(response.steps) == [0, 2]
    for tensor, whole in (
        (response.influences, index.trajectories(sketches, ids, resolve=mode)),
        (response.standard_errors, index.standard_errors(sketches, ids, resolve=mode)),
    ):
        np.testing.assert_array_equal(from_tensor(tensor, dtype="float32"), whole[..., [0, 2]])


def test_many_examples_are_measured_in_blocks_with_the_same_numbers(
    served: Served, index: Index, sketches: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopsway.service.questions.DECODED_BYTES", 7 * index.width * 4)
    ids = [f"tiny-{row}" for row in range(20)]
    request = pb.GetTrajectoriesRequest(queries=[sketch_query(index, sketches[0])], example_ids=ids)
    got = from_tensor(served.stub.GetTrajectories(request).influences)
    np.testing.assert_allclose(got, index.trajectories(sketches[:1], ids), rtol=ROUNDING, atol=1e-7)


def test_queries_of_every_kind_share_a_request_and_answer_as_alone(
    served: Served, index: Index, sketches: np.ndarray
) -> None:
    queries = [
        json_query(QUERIES[0]),
        sketch_query(index, sketches[1]),
        pb.Query(example_id="tiny-9"),
        json_query(QUERIES[2]),
    ]
    together = served.stub.FindInfluences(pb.FindInfluencesRequest(queries=queries)).results
    for query, result in zip(queries, together, strict=True):
        alone = served.stub.FindInfluences(pb.FindInfluencesRequest(queries=[query])).results[0]
        assert [p.example_id for p in result.total.proponents] == [p.example_id for p in alone.total.proponents]
        np.testing.assert_allclose(
            [p.influence for p in result.total.proponents],
            [p.influence for p in alone.total.proponents],
            rtol=ROUNDING,
        )


def test_queries_of_other_lengths_are_answered_beside_each_other(served: Served, index: Index) -> None:
    queries = [json_query(QUERIES[0] | {"num_steps": steps}) for steps in (2, 3, 5)]
    request = pb.FindInfluencesRequest(queries=queries)
    results = served.stub.FindInfluences(request).results
    assert [result.query.step_count for result in results] == [2, 3, 5]
    assert [len(result.steps) for result in results] == [2, 3, 5]
    per_train_step = pb.GetTrajectoriesRequest(
        queries=queries, example_ids=["tiny-0"], resolve=pb.RESOLVE_MODE_TRAIN_STEP
    )
    response = served.stub.GetTrajectories(per_train_step)
    assert (list(response.influences.shape), list(response.steps)) == ([3, 1, 3], [0, 1, 2])
    for mode, shape in ((pb.RESOLVE_MODE_QUERY_STEP, [1, 1, 1]), (pb.RESOLVE_MODE_STEP_MATRIX, [1, 1, 3, 1])):
        alone = [
            served.stub.GetTrajectories(
                pb.GetTrajectoriesRequest(queries=[query], example_ids=["tiny-0"], resolve=mode, steps=[1])
            ).influences
            for query in queries
        ]
        together = served.stub.GetTrajectories(
            pb.GetTrajectoriesRequest(queries=queries, example_ids=["tiny-0"], resolve=mode, steps=[1])
        ).influences
        assert [list(each.shape) for each in alone] == [shape] * 3
        np.testing.assert_allclose(
            from_tensor(together), np.concatenate([from_tensor(each) for each in alone]), rtol=ROUNDING, atol=1e-7
        )


def test_an_indexed_example_as_query_is_its_own_strongest_proponent(served: Served) -> None:
    request = pb.FindInfluencesRequest(queries=[pb.Query(example_id="tiny-7")], k=1)
    result = served.stub.FindInfluences(request).results[0]
    assert result.total.proponents[0].example_id == "tiny-7"
    assert len(result.query.losses) == 2
    assert all(loss > 0 for loss in result.query.losses)


def test_k_is_ten_when_unset_and_more_than_there_is_gives_what_there_is(
    served: Served, index: Index, sketches: np.ndarray
) -> None:
    query = sketch_query(index, sketches[0])
    ten = served.stub.FindInfluences(pb.FindInfluencesRequest(queries=[query])).results[0].total
    assert (len(ten.proponents), len(ten.opponents)) == (10, 10)
    every = served.stub.FindInfluences(pb.FindInfluencesRequest(queries=[query], k=1000)).results[0].total
    ids = [influencer.example_id for influencer in (*every.proponents, *every.opponents)]
    assert len(ids) == len(set(ids)) == index.num_examples


def test_only_the_steps_asked_for_are_ranked_ascending(served: Served, index: Index, sketches: np.ndarray) -> None:
    request = pb.FindInfluencesRequest(queries=[sketch_query(index, sketches[0])], steps=[2, 0])
    result = served.stub.FindInfluences(request).results[0]
    assert [ranking.step for ranking in result.steps] == [0, 2]
    assert result.total.proponents


def test_metadata_arrives_as_the_task_gave_it(served: Served) -> None:
    request = pb.FindInfluencesRequest(queries=[pb.Query(example_id="tiny-7")], k=1)
    metadata = served.stub.FindInfluences(request).results[0].total.proponents[0].metadata
    # A double can't hold 2**60 + 7: it travels as text, as in proto3's JSON.
    expected = {"row": 7, "half": 3.5, "even": False, "name": "ä7", "none": None, "big": str(2**60 + 7)}
    assert MessageToDict(metadata) == expected


@pytest.mark.parametrize("name", ["", "tiny"])
def test_get_index_describes_the_index(served: Served, index: Index, name: str) -> None:
    message = served.stub.GetIndex(pb.GetIndexRequest(index=name)).index
    assert message.name == "tiny"
    assert (message.example_count, message.step_count) == (index.num_examples, index.num_steps)
    assert (message.width, message.bits, message.fingerprint) == (256, 8, index.fingerprint)
    assert list(message.loop.body) == ["block"]
    assert message.loop.marker == ""
    assert [(each.name, each.learning_rate) for each in message.checkpoints] == [("early", 0.1), ("late", 0.05)]
    np.testing.assert_allclose([each.mean_loss for each in message.checkpoints], index.mean_losses())
    assert message.size_bytes == index.size_bytes
    assert message.generation == 1
    assert message.create_time.ToJsonString()[:19] == index.created_at[:19]
    assert [(each.k, each.mean) for each in message.recalls] == [(10, index.recall["recall@10"])]
    assert message.accepts_examples
    assert message.max_gradient_bytes == 1 << 30
    assert not message.HasField("refused")
    assert message.server_version == version("loopsway")
