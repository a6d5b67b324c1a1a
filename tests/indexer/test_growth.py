"""An index grows by generations, loses examples by tombstones, and is rewritten without them; readers go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cutting import BATCH_SIZE, BLOCK_ROWS, CONFIG, COUNT
from looped import LoopedTask
from loopsway.indexer import (
    Index,
    IndexDamagedError,
    IndexExistsError,
    IndexLockedError,
    IndexNotFoundError,
    SketchConfig,
    TaskError,
    UnknownExampleError,
    add_examples,
    compact_index,
    delete_examples,
    open_index,
    prune_index,
    verify_index,
)
from loopsway.indexer.building.examples import SubsetTask
from loopsway.indexer.building.verification import check_added
from loopsway.indexer.store.folders import LocalFolder
from loopsway.indexer.store.lock import writer_lock
from loopsway.indexer.store.manifest import Manifest

from .conftest import build

HALF = 27  # not a whole number of blocks


def part_of(rows: range, **attributes: Any) -> SubsetTask:
    task = LoopedTask(count=COUNT)
    for name, value in attributes.items():
        setattr(task, name, value)
    return SubsetTask(task, rows)


def add(path: Path, task: Any, **arguments: Any) -> Index:
    arguments = {"block_rows": BLOCK_ROWS, "batch_size": BATCH_SIZE, "progress": False, **arguments}
    return add_examples(task, path, **arguments)


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """The whole index's examples in two parts."""
    path = tmp_path / "grown.index"
    build(path, part_of(range(HALF)))  # pyright: ignore[reportArgumentType]
    add(path, part_of(range(HALF, COUNT)))
    return path


def queries() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 4, 256)).astype(np.float32)


def answers(index: Index, k: int = 7) -> list[Any]:
    """All that searches answer, ids and rounded influences."""
    return [
        (side.example_ids, [float(f"{value:.4g}") for value in side.influences])
        for resolve in ("query_step", "train_step", "same_step")
        for ranking in index.search(queries(), k=k, resolve=resolve)
        for at in (ranking.total, *ranking.steps)
        for side in (at.proponents, at.opponents)
    ]


def test_two_parts_answer_as_one(whole_index: Path, grown: Path) -> None:
    index, whole = open_index(grown), open_index(whole_index)
    assert (index.num_examples, index.num_rows, index.generation) == (COUNT, COUNT, 2)
    assert answers(index) == answers(whole)
    ids = [f"train/{row}" for row in (3, 49, 26, 27, 0)]
    np.testing.assert_allclose(index.trajectories(queries(), ids), whole.trajectories(queries(), ids), rtol=1e-4)
    np.testing.assert_allclose(index.mean_losses(), whole.mean_losses(), rtol=1e-6)
    np.testing.assert_allclose(index.step_norms(), whole.step_norms(), rtol=1e-5)
    assert index.example(30) == whole.example(30)
    assert verify_index(grown, progress=False) == []


def test_a_reader_goes_on_with_the_generation_that_it_opened(grown: Path) -> None:
    first, second = open_index(grown, generation=1), open_index(grown)
    before = answers(first), answers(second)
    delete_examples(grown, ids=["train/3", "train/40"])
    compact_index(grown, progress=False)
    assert (answers(first), answers(second)) == before
    assert [open_index(grown, generation=each).num_examples for each in (1, 2, 3, 4)] == [HALF, 50, 48, 48]
    with pytest.raises(IndexNotFoundError, match="has no generation 9; it keeps 1, 2, 3, 4"):
        open_index(grown, generation=9)


def test_a_cut_addition_is_gone_on_with(grown: Path, tmp_path: Path) -> None:
    class Cut(LoopedTask):
        def losses(self, model: Any, batch: Any) -> Any:
            if (tmp_path / "cut.index/generations/000002/blocks/000000.json").exists():
                raise KeyboardInterrupt
            return super().losses(model, batch)

    path = tmp_path / "cut.index"
    build(path, part_of(range(HALF)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(KeyboardInterrupt):
        add(path, SubsetTask(Cut(count=COUNT), range(HALF, COUNT)))
    assert open_index(path).num_examples == HALF
    with pytest.raises(IndexExistsError, match=r"the beginning of something else .*task_code: .*loopsway prune"):
        add(path, part_of(range(HALF, COUNT)))
    prune_index(path)
    assert not (path / "generations/000002").exists()
    add(path, part_of(range(HALF, COUNT)))
    assert answers(open_index(path)) == answers(open_index(grown))


def test_a_file_that_has_grown_adds_what_is_new(grown: Path) -> None:
    path = grown.with_name("file.index")
    build(path, part_of(range(HALF)))  # pyright: ignore[reportArgumentType]
    whole = LoopedTask(count=COUNT)
    with pytest.raises(TaskError, match=r"27 of 50 examples are in index file already, 'train/0' for one; .*--skip"):
        add(path, whole)
    assert answers(add(path, whole, skip_existing=True)) == answers(open_index(grown))
    with pytest.raises(TaskError, match="nothing to add: all 50 examples"):
        add(path, whole, skip_existing=True)


@pytest.mark.parametrize(("shard_bytes", "most", "num_shards"), [(1, 64, 4), (1, 2, 2), (1 << 30, 64, 1)])
def test_shards_answer_as_one(
    whole_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int, most: int, num_shards: int
) -> None:
    monkeypatch.setattr("loopsway.indexer.search.shards.SHARD_BYTES", shard_bytes)
    monkeypatch.setattr("loopsway.indexer.search.shards.MOST_SHARDS", most)
    path = tmp_path / "sharded.index"
    index, gone = build(path), {f"train/{row}" for row in (*range(16, 32), 49)}
    assert len(list(path.rglob("total-*.faiss"))) == num_shards
    assert answers(index) == answers(open_index(whole_index))
    delete_examples(path, ids=sorted(gone))
    assert answers(open_index(path), COUNT) == without(whole_index, gone), "all of a shard is deleted"


@pytest.mark.parametrize(
    ("task", "error", "text"),
    [
        (LoopedTask("CellModel", count=60), IndexExistsError, "parameters: "),
        (LoopedTask(count=60, num_checkpoints=1), IndexExistsError, "checkpoints: "),
        (part_of(range(40, 50), metadata=lambda row: {"other": row}), TaskError, "have the columns .*other"),
    ],
)
def test_what_does_not_fit_is_not_added(grown: Path, task: Any, error: type[Exception], text: str) -> None:
    path = grown.with_name("fits.index")
    build(path, part_of(range(HALF)))  # pyright: ignore[reportArgumentType]
    before = sorted(path.rglob("*"))
    with pytest.raises(error, match=text):
        add(path, task, skip_existing=True)
    assert sorted(path.rglob("*")) == before


def test_there_must_be_an_index_to_change(tmp_path: Path) -> None:
    path = tmp_path / "none.index"
    for change in (
        lambda: add(path, LoopedTask(count=3)),
        lambda: delete_examples(path, ids=["a"]),
        lambda: compact_index(path),
        lambda: prune_index(path),
    ):
        with pytest.raises(IndexNotFoundError, match="there is no index at"):
            change()
    assert not path.exists()


def without(whole: Path, gone: set[str], k: int = COUNT) -> list[Any]:
    """The whole index's answers without some ids."""
    kept = []
    for ids, influences in answers(open_index(whole), k):
        places = [place for place, each in enumerate(ids) if each not in gone]
        kept.append((tuple(ids[place] for place in places), [influences[place] for place in places]))
    return kept


def test_deleted_examples_are_in_no_answer(whole_index: Path, grown: Path) -> None:
    gone = {"train/3", "train/40", "train/26"}
    assert delete_examples(grown, ids=sorted(gone)) == 3
    index = open_index(grown)
    assert (index.num_examples, index.num_rows, index.generation) == (47, 50, 3)
    assert answers(index, COUNT) == without(whole_index, gone)
    with pytest.raises(UnknownExampleError, match="'train/40' was deleted from index grown"):
        index.trajectories(queries(), ["train/40"])
    assert delete_examples(grown, ids=["train/0", "train/0"]) == 1
    assert answers(open_index(grown), COUNT) == without(whole_index, gone | {"train/0"})
    with pytest.raises(UnknownExampleError, match="'train/3' was deleted"):
        delete_examples(grown, ids=["train/3"])
    assert verify_index(grown, progress=False) == []


def test_a_filter_says_what_to_delete(whole_index: Path, grown: Path) -> None:
    task = LoopedTask(count=COUNT)
    rows = [row for row in range(COUNT) if task.metadata(row)["length"] > 3 and task.metadata(row)["label"] != 0]
    assert 0 < len(rows) < COUNT
    assert delete_examples(grown, where="length > 3 and not label == 0") == len(rows)
    assert answers(open_index(grown), COUNT) == without(whole_index, {f"train/{row}" for row in rows})
    assert delete_examples(grown, where="length > 3 and not label == 0") == 0
    assert open_index(grown).generation == 3, "nothing was deleted: there is no new generation"
    with pytest.raises(ValueError, match="no column 'lenght'"):
        delete_examples(grown, where="lenght > 3")


def test_not_everything_can_be_deleted_and_something_must_be_named(grown: Path) -> None:
    with pytest.raises(ValueError, match="that would delete all 50 examples"):
        delete_examples(grown, where="length > 0")
    for arguments in ({}, {"ids": ["train/0"], "where": "length > 3"}):
        with pytest.raises(ValueError, match="either ids or where"):
            delete_examples(grown, **arguments)


def test_a_deleted_id_can_be_added_again(grown: Path) -> None:
    delete_examples(grown, ids=["train/7"])
    index = add(grown, part_of(range(7, 8)))
    assert index.row_of("train/7") == COUNT
    assert index.num_examples == COUNT
    index.trajectories(queries(), ["train/7"])


def test_compacting_keeps_every_answer_and_every_byte_of_what_stays(grown: Path) -> None:
    gone = {"train/3", "train/40", "train/26"}
    delete_examples(grown, ids=sorted(gone))
    whole = open_index(grown)
    before, kept = answers(whole, COUNT), [row for row in range(COUNT) if f"train/{row}" not in gone]
    stored = whole.stored_rows(np.array(kept))
    index = compact_index(grown, progress=False)
    assert (index.num_examples, index.num_rows, len(index.manifest.parts)) == (47, 47, 1)
    assert answers(index, COUNT) == before
    assert verify_index(grown, progress=False) == []
    for name, values in index.stored_rows(np.arange(47)).items():
        np.testing.assert_array_equal(values, stored[name], err_msg=name)
    assert compact_index(grown, progress=False).generation == index.generation, "there was nothing to compact"


def test_a_cut_compaction_is_gone_on_with(grown: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    delete_examples(grown, ids=["train/3"])
    before = answers(open_index(grown), COUNT)
    with monkeypatch.context() as patch:
        calls = iter([None, None, KeyboardInterrupt()])

        def cut(*_: Any) -> Any:
            if (error := next(calls)) is not None:
                raise error
            return copied(*_)

        from loopsway.indexer.building import editing

        copied = editing._copied
        patch.setattr(editing, "_copied", cut)
        with pytest.raises(KeyboardInterrupt):
            compact_index(grown, progress=False)
    assert open_index(grown).generation == 3
    assert len(list(grown.glob("generations/000004/blocks/*.json"))) == 2
    assert answers(compact_index(grown, progress=False), COUNT) == before
    assert not (grown / "generations/000005").exists()


def test_pruning_removes_what_no_kept_generation_reads(grown: Path) -> None:
    delete_examples(grown, ids=["train/3"])
    compact_index(grown, progress=False)
    size = sum(file.stat().st_size for file in (grown / "generations").rglob("*") if file.is_file())
    two = prune_index(grown, keep=2)
    assert (two.generations, two.parts) == ((1, 2), ()), "the third generation reads the parts of both"
    one = prune_index(grown)
    assert (one.generations, len(one.parts)) == ((3,), 3)
    left = sum(file.stat().st_size for file in (grown / "generations").rglob("*") if file.is_file())
    assert size - left == one.size_bytes > 0
    assert verify_index(grown, progress=False) == []
    assert open_index(grown).num_examples == 49
    with pytest.raises(IndexNotFoundError, match="has no generation 1; it keeps 4"):
        open_index(grown, generation=1)
    with pytest.raises(ValueError, match="keep is 0"):
        prune_index(grown, keep=0)


def test_generations_are_never_numbered_twice(grown: Path) -> None:
    compact_index(grown, progress=False)
    prune_index(grown)
    delete_examples(grown, ids=["train/3"])
    assert open_index(grown).generation == 4
    assert [folder.name for folder in sorted((grown / "generations").iterdir())] == ["000003", "000004"]


def test_changes_are_refused_while_another_writes(grown: Path) -> None:
    with writer_lock(LocalFolder(grown)):
        for change in (
            lambda: add(grown, part_of(range(3))),
            lambda: delete_examples(grown, ids=["train/3"]),
            lambda: compact_index(grown, progress=False),
            lambda: prune_index(grown),
        ):
            with pytest.raises(IndexLockedError, match="is being written by process"):
                change()
        assert open_index(grown).num_examples == COUNT, "readers need no lock"


def test_the_tombstones_and_every_manifest_are_verified(grown: Path) -> None:
    delete_examples(grown, ids=["train/3"])
    for name in ("generations/000003/deleted.parquet", "manifests/000001.json", "generations/000002/plan.json"):
        file = grown / name
        data = file.read_bytes()
        file.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
        assert [damage.file for damage in verify_index(grown, progress=False)] == [str(file)]
        file.write_bytes(data)


def test_what_a_generation_adds_is_compared_and_nothing_else(grown: Path) -> None:
    folder = LocalFolder(grown)
    first, last = Manifest.read(folder, 1), Manifest.read(folder)
    begun: list[None] = []

    def compare() -> None:
        check_added(folder, last, first, lambda: begun.append(None))

    compare()
    assert len(begun) == last.parts[1].plan.num_blocks
    pieces = ("arrays.zarr/step_codes/c/1/0/0", "arrays.zarr/losses/c/0/0", "blocks/000001.json", "examples.parquet")
    for name in pieces:
        old, new = grown / "generations/000001" / name, grown / "generations/000002" / name
        for file in (old, new):
            data = file.read_bytes()
            file.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
            if file == old:
                compare()
            else:
                with pytest.raises(IndexDamagedError, match=f"is damaged: {new}: .*; `loopsway verify` names all"):
                    compare()
            file.write_bytes(data)

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        check_added(folder, last, first, stop)


def test_building_a_grown_index_again_opens_it(grown: Path) -> None:
    assert build(grown, part_of(range(HALF))).generation == 2  # pyright: ignore[reportArgumentType]
    with pytest.raises(IndexExistsError, match="num_examples"):
        build(grown, LoopedTask(count=COUNT), SketchConfig(width=256, bits=1))
    assert open_index(grown).config == CONFIG
