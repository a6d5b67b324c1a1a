"""An index in an object store is the index of a folder: built, cut, resumed, grown, verified, opened and searched."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import object_store
from cutting import (
    BATCH_SIZE,
    BLOCK_ROWS,
    CONFIG,
    COUNT,
    KILLED,
    LEASE_S,
    POINTS,
    computed,
    finished_build,
    killed_build,
    start_build,
)
from looped import LoopedTask
from loopsway.indexer import (
    Index,
    IndexDamagedError,
    IndexLockedError,
    IndexNotFoundError,
    StorageError,
    add_examples,
    build_index,
    compact_index,
    delete_examples,
    open_index,
    prune_index,
    verify_index,
)
from loopsway.indexer.store import lock
from loopsway.indexer.store.addresses import open_folder
from loopsway.indexer.store.s3_folder import S3Folder

from .conftest import answered, assert_same, build, contents
from .test_growth import part_of, queries
from .test_verification import KINDS

NUM_KILLS, KILLS_OF_AN_INDEX = 6, 3


@pytest.fixture
def environment(store_variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of this process and of those that it starts; with an empty cache."""
    variables = store_variables | {"LOOPSWAY_CACHE": str(tmp_path / "cache"), "LOOPSWAY_CACHE_BYTES": str(1 << 30)}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lock, "LEASE_S", LEASE_S)
    return variables


@pytest.fixture
def url(environment: dict[str, str], request: pytest.FixtureRequest) -> str:
    return f"s3://{object_store.BUCKET}/{abs(hash(request.node.name))}/new.index"


@pytest.fixture(scope="module")
def whole_url(store_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """The whole index, built in the object store; not to be changed."""
    url = f"s3://{object_store.BUCKET}/whole.index"
    folder = tmp_path_factory.mktemp("whole")
    variables = store_variables | {"LOOPSWAY_CACHE": str(folder / "cache")}
    assert finished_build(url, folder / "log", environment=variables) == 0
    return url


@pytest.fixture
def copied_url(whole_url: str, url: str) -> str:
    source, copy = open_folder(whole_url), open_folder(url)
    for name in source.files():
        copy.write(name, source.read(name))
    return url


def stored(url: str) -> dict[str, bytes]:
    """What `contents` gives of a local index."""
    folder = open_folder(url)
    return {name: folder.read(name) for name in folder.files() if "/arrays.zarr/" in name or name.endswith(".parquet")}


def entries(url: str) -> set[int]:
    return {int(Path(name).stem) for name in open_folder(url).files() if "/blocks/" in name}


def answers(index: Index, k: int = 7, *, exact: bool = True) -> list[Any]:
    found = (index.search(queries(), k=k, resolve=resolve, exact=exact) for resolve in ("query_step", "train_step"))
    return [answer for rankings in found for answer in answered(rankings)]


def cached(environment: dict[str, str]) -> dict[str, int]:
    """Files of the cache and their inodes."""
    return {file.name: file.stat().st_ino for file in Path(environment["LOOPSWAY_CACHE"]).glob("[!.]*")}


def test_an_index_has_the_bytes_and_the_answers_of_a_local_one(
    whole_url: str, environment: dict[str, str], whole_index: Path
) -> None:
    assert_same(stored(whole_url), contents(whole_index))
    assert verify_index(whole_url, progress=False) == []
    index, local = open_index(whole_url), open_index(whole_index)
    assert answers(index) == answers(local)
    assert index.path == whole_url
    assert (index.name, index.num_examples, index.size_bytes) == ("whole", COUNT, local.size_bytes)
    assert set(open_folder(whole_url).files()) == set(open_folder(whole_index).files()) - {"writer.lock"}
    assert index.recall == local.recall


def test_files_are_fetched_once_and_searched_in_the_cache(whole_url: str, environment: dict[str, str]) -> None:
    first = answers(open_index(whole_url))
    files = cached(environment)
    assert len(files) >= 5 * 4, "four chunks of codes for each slot"
    assert answers(open_index(whole_url)) == first
    assert cached(environment) == files
    assert answers(open_index(whole_url), exact=False) == first
    with_faiss = cached(environment)
    assert len(with_faiss) == len(files) + 5, "and a FAISS index when it is asked"
    assert answers(open_index(whole_url), exact=False) == first
    assert cached(environment) == with_faiss


def test_after_warming_up_a_search_fetches_nothing(whole_url: str, environment: dict[str, str]) -> None:
    index = open_index(whole_url)
    index.warm_up()
    files = cached(environment)
    assert len(files) >= 5 * 4 + 2
    answers(index, k=COUNT)
    assert cached(environment) == files


def test_a_finished_index_is_opened_by_the_same_build(whole_url: str, environment: dict[str, str]) -> None:
    before = open_folder(whole_url).files()
    assert build_on(whole_url).num_examples == COUNT
    assert open_folder(whole_url).files() == before


def build_on(url: str) -> Index:
    task = LoopedTask(count=COUNT)
    return build_index(task, url, CONFIG, block_rows=BLOCK_ROWS, batch_size=BATCH_SIZE, progress=False)


@pytest.mark.parametrize("point", POINTS)
def test_a_build_killed_at_any_point_finishes_to_the_same_bytes(
    url: str, environment: dict[str, str], whole_index: Path, tmp_path: Path, point: str
) -> None:
    assert finished_build(url, tmp_path / "first.log", point, environment) == KILLED
    if point != "after publishing":
        with pytest.raises(IndexNotFoundError, match="unfinished: run the same `loopsway build` again"):
            open_index(url)
    finished = entries(url)
    assert len(finished) == {"in a block": 1, "after chunks": 1, "after an entry": 2}.get(point, 4)
    assert finished_build(url, tmp_path / "second.log", environment=environment) == 0
    assert set(computed(tmp_path / "second.log")) == set(range(4)) - finished
    assert_same(stored(url), contents(whole_index))
    assert verify_index(url, progress=False) == []
    assert answers(open_index(url)) == answers(open_index(whole_index))


@pytest.mark.timeout(600)
def test_a_build_killed_at_random_moments_finishes_to_the_same_bytes(
    url: str, environment: dict[str, str], whole_index: Path, tmp_path: Path
) -> None:
    begin = time.monotonic()
    assert finished_build(f"{url}/uncut", tmp_path / "uncut.log", environment=environment) == 0
    duration = LEASE_S + time.monotonic() - begin
    random_moments, num_kills = random.Random(0), 0
    for number in range(20):
        if num_kills >= NUM_KILLS:
            break
        place = f"{url}/{number}"
        for kill in range(KILLS_OF_AN_INDEX):
            finished, log = entries(place), tmp_path / f"{number}-{kill}.log"
            num_kills += killed_build(place, log, random_moments.uniform(0, duration), environment)
            assert not finished & set(computed(log)), "a finished block was computed again"
        assert finished_build(place, tmp_path / f"{number}.log", environment=environment) == 0
        assert_same(stored(place), contents(whole_index))
        assert verify_index(place, progress=False) == []
    assert num_kills >= NUM_KILLS


def test_an_index_grows_and_shrinks_as_a_local_one(url: str, environment: dict[str, str], tmp_path: Path) -> None:
    local, results = tmp_path / "local.index", []
    for place in (local, url):
        arguments = {"block_rows": BLOCK_ROWS, "batch_size": BATCH_SIZE, "progress": False}
        build_index(part_of(range(27)), place, CONFIG, **arguments)
        old = open_index(place)
        before = answers(old)
        add_examples(part_of(range(27, COUNT)), place, **arguments)
        assert delete_examples(place, ids=["train/3", "train/40"]) == 2
        assert answers(old) == before, "a reader keeps its generation"
        index = open_index(place)
        assert (index.generation, index.num_examples) == (3, COUNT - 2)
        assert verify_index(place, progress=False) == []
        first = answers(index), answers(open_index(place, generation=1))
        assert answers(compact_index(place, progress=False)) == first[0]
        pruned = prune_index(place)
        assert (pruned.generations, len(pruned.parts)) == ((1, 2, 3), 3)
        assert verify_index(place, progress=False) == []
        results.append((first, answers(open_index(place)), pruned.size_bytes))
    assert results[0] == results[1]
    left = {name for name in open_folder(url).files() if name != "writer.lock"}
    assert left == {file for file in open_folder(local).files() if file != "writer.lock"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_damage_is_found_and_named(copied_url: str, kind: str) -> None:
    folder = open_folder(copied_url)
    name = next(name for name in folder.files() if Path(name).match(KINDS[kind]))
    content = folder.read(name)
    middle = len(content) // 2
    for damaged in (content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :], content[:-1], b"", None):
        if damaged is None:
            if kind == "the manifest":
                continue  # without it there is no index
            folder.remove([name])
        else:
            folder.write(name, damaged)
        assert folder.at(name) in {damage.file for damage in verify_index(copied_url, progress=False)}
    folder.write(name, content)
    assert verify_index(copied_url, progress=False) == []


@pytest.mark.parametrize("kind", ["codes of a step", "the total's FAISS index"])
def test_a_damaged_object_is_never_searched(copied_url: str, kind: str) -> None:
    folder = open_folder(copied_url)
    name = next(name for name in folder.files() if Path(name).match(KINDS[kind]))
    content = folder.read(name)
    folder.write(name, bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(IndexDamagedError, match="is damaged: it does not match its digest"):
        answers(open_index(copied_url), exact="FAISS" not in kind)


def test_a_damaged_copy_in_the_cache_is_fetched_again(whole_url: str, environment: dict[str, str]) -> None:
    first = answers(open_index(whole_url))
    for name in cached(environment):
        file = Path(environment["LOOPSWAY_CACHE"]) / name
        file.write_bytes(b"damaged" + file.read_bytes()[7:])
    environment["LOOPSWAY_CACHE_BYTES"] = os.environ["LOOPSWAY_CACHE_BYTES"] = str(1 << 29)  # as another process would
    assert answers(open_index(whole_url)) == first


def test_the_cache_stays_within_its_bytes(
    whole_url: str, environment: dict[str, str], whole_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = next(whole_index.rglob("rows.npy")).stat().st_size
    other = sum(file.stat().st_size for file in whole_index.rglob("*.parquet"))
    chunk = next(whole_index.glob("generations/*/arrays.zarr/total_codes/c/0/0")).stat().st_size
    limit = table + other + 2 * chunk
    monkeypatch.setenv("LOOPSWAY_CACHE_BYTES", str(limit))
    index, folder = open_index(whole_url), Path(environment["LOOPSWAY_CACHE"])
    for _ in range(2):
        assert answers(index) == answers(open_index(whole_index))
        assert sum(file.stat().st_size for file in folder.glob("[!.]*")) <= limit
    monkeypatch.setenv("LOOPSWAY_CACHE_BYTES", str(table // 2))
    monkeypatch.setenv("LOOPSWAY_CACHE", f"{folder}-of-others")
    with pytest.raises(StorageError, match=rf"holds at most {table // 2:,} bytes.*set LOOPSWAY_CACHE_BYTES higher"):
        open_index(whole_url)
    monkeypatch.setenv("LOOPSWAY_CACHE_BYTES", "much")
    with pytest.raises(ValueError, match="LOOPSWAY_CACHE_BYTES is 'much', expected a positive number of bytes"):
        open_index(whole_url)


def test_a_second_writer_is_refused_while_the_first_lives(url: str, environment: dict[str, str]) -> None:
    with lock.writer_lock(open_folder(url)):
        with pytest.raises(IndexLockedError, match=rf"is being written by process {os.getpid()} on \S+, since 20\d\d-"):
            build_on(url)
        assert open_folder(url).files() == ["writer.lock"]
    assert build_on(url).num_examples == COUNT


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_writer_that_was_held_up_does_not_publish_over_another(
    url: str, environment: dict[str, str], whole_index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    process = start_build(url, tmp_path / "log", environment=environment)
    wait_for(lambda: open_folder(url).files("generations"))
    os.kill(process.pid, signal.SIGSTOP)
    build_on(url)
    assert f"is being written by process {process.pid}" in caplog.text, "it waited for the lease to run out"
    published = open_folder(url).read("manifest.json")
    os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert process.exitcode == 1
    assert open_folder(url).read("manifest.json") == published
    assert_same(stored(url), contents(whole_index))
    assert verify_index(url, progress=False) == []


def test_what_can_not_be_reached_is_an_error_that_says_so(
    url: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IndexNotFoundError, match=rf"there is no index at {url}"):
        open_index(url)
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/a\.index: the bucket does not exist"):
        build_on("s3://no-such-bucket/a.index")
    with pytest.raises(ValueError, match="is not of the form s3://bucket/prefix"):
        open_index("s3://bucket")
    with pytest.raises(ValueError, match="is a URL of a kind that Loopsway can't read"):
        open_index("https://example.com/a.index")
    with pytest.raises(ValueError, match="pass the URL as a str"):
        open_index(Path(url))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("loopsway.indexer.store.s3_folder.RETRIES", {"max_retries": 1})
    with pytest.raises(StorageError, match=r"can't be reached: .*AWS_ENDPOINT_URL.*run the same command to go on"):
        open_index(url)


def test_a_local_build_and_an_object_store_share_no_state(environment: dict[str, str], tmp_path: Path) -> None:
    build(tmp_path / "local.index")
    assert not cached(environment), "a local index is read in place"
    assert isinstance(open_folder(f"s3://{object_store.BUCKET}/a"), S3Folder)
