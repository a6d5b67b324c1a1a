"""Results as data frames: one row for each number, and a clear word where pandas is missing."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest

from loopsway.client import (
    ExampleNeighbors,
    Influencer,
    InfluenceResult,
    InfluencerTrajectories,
    Neighbor,
    QuerySummary,
    Ranking,
    ScoreChunk,
)
from loopsway.client import Trajectories as AskedTrajectories

SUMMARY = QuerySummary(num_steps=3, losses=(), steps_without_gradient=())


def influencer(example_id: str, influence: float, **metadata: object) -> Influencer:
    return Influencer(
        example_id=example_id, description=f"the {example_id}", metadata=metadata, influence=influence, standard_error=1
    )


RESULT = InfluenceResult(
    query=SUMMARY,
    total=Ranking(
        step=None, proponents=(influencer("a", 5, rank="x"), influencer("b", 1)), opponents=(influencer("c", -3),)
    ),
    steps=(Ranking(step=2, proponents=(), opponents=(influencer("c", -1, rank=None, of=2),)),),
    recall=1,
    coverage=1,
    index="tiny",
    generation=1,
    fingerprint="cafe",
)


def test_an_answer_has_a_row_for_each_influencer_of_each_ranking() -> None:
    frame = RESULT.to_pandas()
    assert frame["example_id"].tolist() == ["a", "b", "c", "c"]
    assert frame["sign"].tolist() == ["proponent", "proponent", "opponent", "opponent"]
    assert frame["rank"].tolist() == [1, 2, 1, 1]
    assert frame["step"].isna().tolist() == [True, True, True, False]
    assert frame["step"].iloc[3] == 2
    assert frame["influence"].tolist() == [5, 1, -3, -1]
    assert frame["significant"].tolist() == [True, False, True, False]
    assert frame["metadata.rank"].iloc[0] == "x"
    assert frame["metadata.of"].isna().tolist() == [True, True, True, False]
    assert frame.groupby("sign")["influence"].sum().to_dict() == {"proponent": 6, "opponent": -4}


def test_an_answer_without_influencers_has_its_columns_and_no_row() -> None:
    empty = Ranking(step=None, proponents=(), opponents=())
    frame = InfluenceResult(
        query=SUMMARY, total=empty, steps=(), recall=1, coverage=1, index="tiny", generation=1, fingerprint="cafe"
    ).to_pandas()
    assert len(frame) == 0
    assert list(frame.columns)[:5] == ["step", "sign", "rank", "example_id", "influence"]


def test_scores_have_their_ranks_and_add_up_over_chunks() -> None:
    values, errors = np.array([3, 0.5], np.float32), np.ones(2, np.float32)
    chunks = [
        ScoreChunk(
            step=step,
            first_rank=rank,
            example_ids=("a", "b"),
            influences=values,
            standard_errors=errors,
            coverage=1,
            queries=(),
            index="tiny",
            generation=1,
            fingerprint="cafe",
        )
        for step, rank in ((None, 1), (4, 11))
    ]
    frame = pd.concat([chunk.to_pandas() for chunk in chunks], ignore_index=True)
    assert frame["rank"].tolist() == [1, 2, 11, 12]
    assert frame["step"].isna().tolist() == [True, True, False, False]
    assert frame["significant"].tolist() == [True, False, True, False]


def neighbors_of(example_id: str, *neighbors: Neighbor) -> ExampleNeighbors:
    return ExampleNeighbors(
        example_id=example_id, neighbors=neighbors, coverage=1, index="tiny", generation=1, fingerprint="cafe"
    )


def test_neighbors_of_several_examples_are_one_frame() -> None:
    near = Neighbor(example_id="b", description="the b", metadata={"rank": 7}, similarity=0.5, standard_error=0.1)
    far = Neighbor(example_id="c", description="the c", metadata={}, similarity=-0.25, standard_error=0.1)
    answers = [neighbors_of("a", near, far), neighbors_of("x", far)]
    frame = pd.concat([answer.to_pandas() for answer in answers], ignore_index=True)
    assert list(frame.columns[:5]) == ["example_id", "rank", "neighbor_id", "similarity", "standard_error"]
    assert frame["example_id"].tolist() == ["a", "a", "x"]
    assert frame["rank"].tolist() == [1, 2, 1]
    assert frame["neighbor_id"].tolist() == ["b", "c", "c"]
    assert frame["similarity"].tolist() == [0.5, -0.25, -0.25]
    assert frame["metadata.rank"].isna().tolist() == [False, True, True]
    assert list(neighbors_of("a").to_pandas().columns) == [*frame.columns[:5], "description"]


def test_trajectories_have_a_row_for_each_step_of_each_example() -> None:
    numbers = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    asked = AskedTrajectories(
        influences=numbers,
        standard_errors=numbers,
        queries=(SUMMARY, SUMMARY),
        example_ids=("a", "b"),
        steps=(0, 3, 5),
        index="tiny",
        generation=1,
        fingerprint="cafe",
    )
    frame = asked.to_pandas()
    assert list(frame.columns) == ["query", "example_id", "step", "influence", "standard_error"]
    for row in frame.itertuples():
        assert row.influence == numbers[row.query, "ab".index(row.example_id), (0, 3, 5).index(row.step)]
    answered = InfluencerTrajectories(example_ids=("a", "b"), influences=numbers[0], standard_errors=numbers[0])
    assert answered.to_pandas().pivot(index="example_id", columns="step", values="influence").loc["b", 2] == 5
    none = InfluencerTrajectories(example_ids=(), influences=numbers[0, :0], standard_errors=numbers[0, :0])
    assert len(none.to_pandas()) == 0


def test_a_step_matrix_names_both_steps() -> None:
    numbers = np.arange(6, dtype=np.float32).reshape(1, 1, 3, 2)
    frame = AskedTrajectories(
        influences=numbers,
        standard_errors=numbers,
        queries=(SUMMARY,),
        example_ids=("a",),
        steps=(1, 4),
        index="tiny",
        generation=1,
        fingerprint="cafe",
    ).to_pandas()
    assert frame.set_index(["train_step", "query_step"])["influence"].to_dict() == {
        (i, step): numbers[0, 0, i, j] for i in range(3) for j, step in enumerate((1, 4))
    }


def test_without_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        RESULT.to_pandas()
