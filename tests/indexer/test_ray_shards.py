"""Real Ray: an index that is read in actors answers as in one process, whoever dies or hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopsway.indexer import Index, IndexDamagedError, find_neighbors, open_index
from loopsway.indexer.search.sharded import ShardsUnavailableError, shard_rows

from .conftest import answered

ray: Any = pytest.importorskip("ray", reason="Ray is not installed; pip install 'loopsway[ray]'")

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)

SHARDS, PATIENCE_S = 2, 60


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def index(_cluster: None, whole_index: Path) -> Iterator[Index]:
    from loopsway.indexer.search.ray_shards import open_ray_index

    index = open_ray_index(whole_index, workers=SHARDS)
    yield index
    index.close()


@pytest.fixture
def whole(whole_index: Path) -> Index:
    return open_index(whole_index)


def queries() -> np.ndarray:
    return np.random.default_rng(2).standard_normal((2, 4, 256)).astype(np.float32)


def places(index: Index) -> list[Any]:
    shards: Any = index.reader._shards
    return shards._places


def pid_of(place: Any) -> int:
    return ray.get(place.actor.__ray_call__.remote(lambda _: os.getpid()))


def coverage(index: Index, **options: Any) -> float:
    return index.search(queries()[0], k=3, **options).coverage


def wait_until_whole(index: Index) -> None:
    until = time.monotonic() + PATIENCE_S
    while coverage(index) < 1:
        assert time.monotonic() < until, "a shard does not come back"
        time.sleep(0.05)


def test_actors_answer_as_one_process(index: Index, whole: Index) -> None:
    for options in ({}, {"resolve": "train_step"}, {"where": "label == 1"}, {"k": 99}):
        got, want = (each.search(queries(), **{"k": 7, **options}) for each in (index, whole))
        assert answered(got) == answered(want)
        assert {each.coverage for each in got} == {1}
    got, want = (each.scores(queries(), "train_step") for each in (index, whole))
    assert got.influences.tolist() == want.influences.tolist()
    assert got.standard_errors.tolist() == want.standard_errors.tolist()
    ids = ["train/0", "train/49"]
    for got, want in zip(find_neighbors(index, ids), find_neighbors(whole, ids), strict=True):
        assert (got.example_ids, got.similarities.tolist()) == (want.example_ids, want.similarities.tolist())
    assert index.trajectories(queries(), ids).tolist() == whole.trajectories(queries(), ids).tolist()


def test_a_shard_that_is_killed_under_load_is_missed_and_comes_back(index: Index, whole: Index) -> None:
    lost = shard_rows(whole.blocks(), SHARDS)[0]
    others = " and ".join(f"id != 'train/{row}'" for row in lost)
    asked: dict[str, Any] = {"k": 5, "resolve": "train_step"}
    expected = {1.0: answered(whole.search(queries(), **asked))}
    expected[0.5] = answered(whole.search(queries(), where=others, **asked))
    seen: list[float] = []
    failures: list[Any] = []
    ending = threading.Event()

    def load() -> None:
        while not ending.is_set():
            try:
                found = index.search(queries(), **asked)
                assert answered(found) == expected[found[0].coverage]
                seen.append(found[0].coverage)
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    first, killed = places(index)[0], pid_of(places(index)[0])
    os.kill(killed, signal.SIGKILL)
    until = time.monotonic() + PATIENCE_S
    while not (0.5 in seen and seen[-1] == 1) and time.monotonic() < until and not failures:
        time.sleep(0.05)
    ending.set()
    for thread in threads:
        thread.join()
    assert not failures
    assert set(seen) == {0.5, 1.0}
    assert seen[-1] == 1
    assert pid_of(first) != killed


def test_an_actor_that_is_killed_for_good_is_replaced(index: Index) -> None:
    ray.kill(places(index)[1].actor)
    wait_until_whole(index)


def test_a_shard_that_hangs_is_waited_for_until_the_deadline(index: Index) -> None:
    from loopsway.indexer.search.ray_shards import MOST_LATE

    hanging = pid_of(places(index)[0])
    os.kill(hanging, signal.SIGSTOP)
    try:
        for _ in range(MOST_LATE):
            start = time.monotonic()
            assert coverage(index, deadline=start + 0.5) == 0.5
            assert 0.4 < time.monotonic() - start < 5
        start = time.monotonic()
        assert coverage(index, deadline=start + 30) == 0.5
        assert time.monotonic() - start < 10, "a shard that owes answers is asked again"
    finally:
        os.kill(hanging, signal.SIGCONT)
    wait_until_whole(index)
    assert pid_of(places(index)[0]) == hanging


def test_without_any_shard_there_is_no_answer(index: Index) -> None:
    for place in places(index):
        os.kill(pid_of(place), signal.SIGKILL)
    with pytest.raises(ShardsUnavailableError, match="none of 2 shards answered in time"):
        index.search(queries())
    wait_until = time.monotonic() + PATIENCE_S
    while time.monotonic() < wait_until:
        try:
            wait_until_whole(index)
            return
        except ShardsUnavailableError:
            time.sleep(0.05)
    raise AssertionError("no shard comes back")


@pytest.mark.usefixtures("_cluster")
def test_what_an_actor_can_not_open_is_told_as_in_one_process(copied: Path) -> None:
    from loopsway.indexer.search.ray_shards import open_ray_index

    next(copied.glob("generations/*/arrays.zarr/step_codes/c/2/3/0")).write_bytes(b"short")
    with pytest.raises(IndexDamagedError, match=r"chunk .*step_codes/c/2/3/0 is missing or cut short"):
        open_ray_index(copied, workers=2)
