"""A build that is killed, at any moment, finishes to the same bytes and computes no finished block again."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pytest

from cutting import KILLED, POINTS, computed, finished_build, killed_build, start_build
from loopsway.indexer import IndexLockedError, IndexNotFoundError, open_index, verify_index

from .conftest import assert_same, build, contents

NUM_KILLS, KILLS_OF_AN_INDEX = 30, 5


def entries(path: Path) -> set[int]:
    return {int(file.stem) for file in path.glob("generations/*/blocks/*.json")}


def assert_whole(path: Path, whole: Path) -> None:
    assert_same(contents(path), contents(whole))
    assert not list(path.rglob("*.partial"))
    assert verify_index(path, progress=False) == []
    queries = np.random.default_rng(0).standard_normal((3, 4, 256)).astype(np.float32)
    got, want = (open_index(each).search(queries, k=5) for each in (path, whole))
    for mine, others in zip(got, want, strict=True):
        assert mine.total.proponents.example_ids == others.total.proponents.example_ids
        np.testing.assert_array_equal(mine.total.opponents.influences, others.total.opponents.influences)


@pytest.mark.parametrize("point", POINTS)
def test_a_build_killed_at_any_point_finishes_to_the_same_bytes(whole_index: Path, tmp_path: Path, point: str) -> None:
    path, first, second = tmp_path / "killed.index", tmp_path / "first.log", tmp_path / "second.log"
    assert finished_build(path, first, point) == KILLED
    if point != "after publishing":
        with pytest.raises(IndexNotFoundError, match="unfinished: run the same `loopsway build` again"):
            open_index(path)
    finished = entries(path)
    assert len(finished) == {"in a block": 1, "after chunks": 1, "after an entry": 2}.get(point, 4)
    assert finished_build(path, second) == 0
    assert set(computed(second)) == set(range(4)) - finished
    assert_whole(path, whole_index)


@pytest.mark.parametrize("change", range(1, 21))
def test_a_build_killed_as_it_begins_finishes_to_the_same_bytes(whole_index: Path, tmp_path: Path, change: int) -> None:
    """Before each of its first changes to its folder, which random moments seldom fall between."""
    path = tmp_path / "killed.index"
    assert finished_build(path, tmp_path / "first.log", change) == KILLED
    assert finished_build(path, tmp_path / "second.log") == 0
    assert_whole(path, whole_index)


@pytest.mark.timeout(600)
def test_a_build_killed_at_random_moments_finishes_to_the_same_bytes(whole_index: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    assert finished_build(tmp_path / "uncut.index", tmp_path / "uncut.log") == 0
    duration = time.monotonic() - begin
    random_moments = random.Random(0)
    num_kills = 0
    for number in range(100):
        if num_kills >= NUM_KILLS:
            break
        path = tmp_path / f"{number}.index"
        for kill in range(KILLS_OF_AN_INDEX):
            finished, log = entries(path), tmp_path / f"{number}-{kill}.log"
            num_kills += killed_build(path, log, random_moments.uniform(0, duration))
            assert not finished & set(computed(log)), "a finished block was computed again"
        assert finished_build(path, tmp_path / f"{number}.log") == 0
        assert_whole(path, whole_index)
    assert num_kills >= NUM_KILLS


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_lock(whole_index: Path, tmp_path: Path) -> None:
    path, log = tmp_path / "locked.index", tmp_path / "log"
    process = start_build(path, log)
    while not (path / "generations").exists():
        time.sleep(0.01)
    with pytest.raises(IndexLockedError, match=rf"is being written by process {process.pid} on \S+, since 20\d\d-.*T"):
        build(path)
    process.kill()
    process.join()
    build(path)
    assert_whole(path, whole_index)
