"""Shards of an index answer together as one reading of it does; without one, as if it had no such rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from looped import LoopedTask
from loopsway.indexer import (
    FilterError,
    Index,
    Ranking,
    SketchConfig,
    add_examples,
    delete_examples,
    find_neighbors,
    open_index,
)
from loopsway.indexer.building.examples import SubsetTask
from loopsway.indexer.search.sharded import ShardsUnavailableError, shard_rows
from silence import read_in_shards

from .conftest import build

COUNT, STEPS, WIDTH = 90, 4, 256
DELETED = ("train/2", "train/33", "train/34", "train/89")
FILTERS = (None, "label == 1 and length < 6", "id == 'train/17'", "label == 9")


@pytest.fixture(scope="module", params=(1, 4, 16, 32), ids=lambda bits: f"{bits} bits")
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts with blocks of 8 rows, equal rows among them, and deleted rows."""
    path = tmp_path_factory.mktemp("sharded") / "x.index"
    options: dict[str, Any] = {"block_rows": 8, "batch_size": 8, "progress": False}
    task = LoopedTask(count=COUNT)
    first: Any = SubsetTask(task, [*range(40)])
    build(path, first, SketchConfig(width=WIDTH, bits=request.param), **options)
    for rows in (range(40, 53), range(53, COUNT)):
        add_examples(SubsetTask(task, [*rows]), path, **options)
    delete_examples(path, ids=list(DELETED))
    return path


def queries() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, STEPS, WIDTH)).astype(np.float32)


def sharded(path: Path, count: int, silent: Sequence[int] = ()) -> Index:
    """An index that is read in shards, each opened by itself."""
    index = open_index(path)
    read_in_shards(index, count, silent)
    return index


def ranked(rankings: list[Ranking]) -> list[Any]:
    return [
        (at.step, side.example_ids, *(each.tolist() for each in (side.rows, side.influences, side.standard_errors)))
        for ranking in rankings
        for at in (ranking.total, *ranking.steps)
        for side in (at.proponents, at.opponents)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("resolve", ["query_step", "train_step", "same_step"])
def test_shards_rank_as_one_reading_does(path: Path, count: int, resolve: Any) -> None:
    index, whole = sharded(path, count), open_index(path)
    for where in FILTERS:
        for k in (1, 7, COUNT + 1):
            asked: dict[str, Any] = {"k": k, "resolve": resolve, "where": where}
            found = index.search(queries(), **asked)
            assert ranked(found) == ranked(whole.search(queries(), **asked))
            assert {(each.recall, each.coverage) for each in found} == {(1.0, 1.0)}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_score_and_compare_as_one_reading_does(path: Path, count: int) -> None:
    index, whole = sharded(path, count), open_index(path)
    ids = ["train/17", "train/0", "train/88"]
    for where in FILTERS:
        for resolve in ("query_step", "train_step"):
            got, want = (each.scores(queries(), resolve, where=where) for each in (index, whole))
            assert (got.steps, got.coverage) == (want.steps, 1)
            for name in ("rows", "influences", "standard_errors"):
                assert getattr(got, name).tolist() == getattr(want, name).tolist()
        for options in ({}, {"by": "inner_product", "step": 1}, {"k": None, "threshold": 0.1}):
            asked: dict[str, Any] = {"k": 6, "where": where, **options}
            for got, want in zip(find_neighbors(index, ids, **asked), find_neighbors(whole, ids, **asked), strict=True):
                assert (got.example_ids, got.coverage) == (want.example_ids, 1)
                assert got.rows.tolist() == want.rows.tolist()
                assert got.similarities.tolist() == want.similarities.tolist()
                assert got.standard_errors.tolist() == want.standard_errors.tolist()
    got, want = (each.trajectories_with_errors(queries(), ids, "step_matrix") for each in (index, whole))
    assert [each.tolist() for each in got] == [each.tolist() for each in want]


def test_without_a_shard_the_answer_is_that_of_the_others(path: Path) -> None:
    """The oracle is one reading that filters the shard's rows out."""
    index, whole = sharded(path, 4, silent=[2]), open_index(path)
    lost = shard_rows(whole.blocks(), 4)[2]
    others = " and ".join(f"id != 'train/{row}'" for row in lost)
    for resolve in ("query_step", "train_step"):
        found = index.search(queries(), k=9, resolve=resolve)
        assert ranked(found) == ranked(whole.search(queries(), k=9, resolve=resolve, where=others))
        assert {each.coverage for each in found} == {0.75}
        got, want = index.scores(queries(), resolve), whole.scores(queries(), resolve, where=others)
        assert (got.coverage, got.rows.tolist()) == (0.75, want.rows.tolist())
        assert got.influences.tolist() == want.influences.tolist()
    ids = ["train/0", f"train/{lost.start + 1}"]  # one that is itself in the shard that does not answer
    for got, want in zip(find_neighbors(index, ids), find_neighbors(whole, ids, where=others), strict=True):
        assert (got.example_ids, got.coverage) == (want.example_ids, 0.75)
        assert got.similarities.tolist() == want.similarities.tolist()


def test_no_answer_at_all_is_an_error(path: Path) -> None:
    index = sharded(path, 2, silent=[0, 1])
    with pytest.raises(ShardsUnavailableError, match="none of 2 shards answered in time"):
        index.search(queries())
    with pytest.raises(ShardsUnavailableError):
        find_neighbors(index, ["train/0"])
    with pytest.raises(FilterError):  # what is wrong with a question is told before any shard is asked
        index.search(queries(), where="colour == 1")


def test_an_approximate_search_of_shards_reads_every_code(path: Path) -> None:
    found, want = (each.search(queries(), k=5, exact=exact) for each, exact in (
        (sharded(path, 3), False), (open_index(path), True)
    ))  # fmt: skip
    assert ranked(found) == ranked(want)
    assert {each.recall for each in found} == {1.0}


def test_shards_are_whole_blocks_and_about_as_long() -> None:
    blocks = [range(start, start + 10) for start in range(0, 100, 10)]
    assert shard_rows(blocks, 1) == [range(100)]
    assert shard_rows(blocks, 3) == [range(0, 30), range(30, 70), range(70, 100)]
    assert shard_rows(blocks, 99) == blocks
    rng = np.random.default_rng(0)
    for _ in range(200):
        ends = np.cumsum(rng.integers(1, 9, rng.integers(1, 30))).tolist()
        blocks = [range(start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
        shards = shard_rows(blocks, int(rng.integers(1, 12)))
        assert [row for shard in shards for row in shard] == list(range(ends[-1]))
        assert all(shards)
        assert {shard.start for shard in shards} <= {block.start for block in blocks}
