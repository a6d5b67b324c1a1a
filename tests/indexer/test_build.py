"""A build can be cut at any moment and goes on where it was; a task that breaks its contract is told so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
import zarr

from cutting import BATCH_SIZE, BLOCK_ROWS, CONFIG, COUNT
from looped import InjectedModel, LoopedTask, make_model
from loopsway.indexer import (
    Checkpoint,
    ExampleSketcher,
    IndexDamagedError,
    IndexExistsError,
    SketchConfig,
    TaskError,
    open_index,
)
from loopsway.indexer.building.part import new_block_rows
from loopsway.indexer.sketches.coding import encode
from loopsway.indexer.sketches.rotation import rotate

from .conftest import assert_same, build, contents


def test_the_arrays_are_what_the_sketcher_gives(whole_index: Path) -> None:
    """One block is read back with plain zarr and compared with codes made here."""
    task = LoopedTask(count=COUNT)
    rows = range(BLOCK_ROWS, 2 * BLOCK_ROWS)
    sketcher = ExampleSketcher(task, CONFIG, batch_size=BATCH_SIZE)
    sketches = sketcher.sketch([task.examples()[row] for row in rows])
    rotated = rotate(sketches.values, CONFIG.seed)
    group: Any = zarr.open_group(next(whole_index.glob("generations/*/arrays.zarr")), mode="r")
    for step in range(4):
        codes = encode(rotated[:, step], CONFIG.bits)
        np.testing.assert_array_equal(group["step_codes"][step, rows.start : rows.stop], codes.codes)
        np.testing.assert_allclose(group["step_factors"][step, rows.start : rows.stop], codes.factors, rtol=1e-6)
        np.testing.assert_allclose(group["step_norms"][step, rows.start : rows.stop], codes.norms, rtol=1e-6)
    total = encode(rotated.sum(1), CONFIG.bits)
    np.testing.assert_array_equal(group["total_codes"][rows.start : rows.stop], total.codes)
    np.testing.assert_allclose(group["losses"][:, rows.start : rows.stop], sketches.losses, rtol=1e-6)


def test_an_index_says_what_it_holds(whole_index: Path) -> None:
    index, task = open_index(whole_index), LoopedTask(count=COUNT)
    assert (index.num_examples, index.num_steps, index.width, index.bits) == (COUNT, 4, 256, 1)
    assert (index.name, index.generation, index.loop) == ("whole", 1, task.loop)
    assert index.checkpoints == tuple(task.checkpoints())
    assert index.fingerprint == ExampleSketcher(task, CONFIG).fingerprint
    assert index.example(3).id == "train/3"
    assert index.example(3).description == task.describe(3)
    assert index.example(3).metadata == task.metadata(3)
    assert index.row_of("train/49") == 49
    want = ExampleSketcher(task, CONFIG).sketch(task.examples()).losses.mean(1)
    np.testing.assert_allclose(index.mean_losses(), want, rtol=1e-5)
    assert index.size_bytes == sum(f.stat().st_size for f in whole_index.glob("generations/**/*") if f.is_file())
    table = pyarrow.parquet.read_table(next(whole_index.rglob("examples.parquet")))
    assert table.column_names == ["id", "description", "metadata"]


@pytest.mark.parametrize(("count", "rows"), [(1, 128), (1789, 128), (3000, 256), (20_000, 2048), (10**7, 2048)])
def test_a_small_index_has_small_blocks_so_that_a_cut_build_loses_little(count: int, rows: int) -> None:
    assert new_block_rows(count) == rows


def test_a_finished_build_is_opened_as_it_is(copied: Path) -> None:
    before = contents(copied)
    assert build(copied).num_examples == COUNT
    assert_same(contents(copied), before)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"config": SketchConfig(width=512)}, "'width': 256.*'width': 512"),
        ({"config": SketchConfig(width=256, bits=8)}, "'bits': 1.*'bits': 8"),
        ({"task": LoopedTask(count=COUNT + 1)}, "num_examples: 50 -> 51"),
        ({"task": LoopedTask(count=COUNT, num_checkpoints=1)}, "checkpoints: "),
        ({"task": LoopedTask("CellModel", count=COUNT)}, "parameters: "),
    ],
)
@pytest.mark.parametrize("published", [True, False])
def test_a_path_that_holds_something_else_is_refused(copied: Path, change: Any, text: str, published: bool) -> None:
    if not published:
        (copied / "manifest.json").unlink()
    before = contents(copied)
    with pytest.raises(IndexExistsError, match=f"(?s)already holds .* of something else.*{text}"):
        build(copied, **change)
    assert_same(contents(copied), before)


@pytest.mark.parametrize("name", ["plan.json", "blocks/000001.json"])
def test_a_build_does_not_go_on_from_a_damaged_entry(copied: Path, name: str) -> None:
    (copied / "manifest.json").unlink()
    file = next(copied.glob(f"generations/*/{name}"))
    file.write_text(file.read_text().replace("1", "2", 1))
    with pytest.raises(
        IndexDamagedError, match=rf"{Path(name).name} is damaged: its content does not match its digest"
    ):
        build(copied)


class NoExamples(LoopedTask):
    def examples(self) -> list[Any]:
        return []


class TwiceTheSame(LoopedTask):
    def example_id(self, row: int) -> str:
        return str(row % 30)


class MixedMetadata(LoopedTask):
    def metadata(self, row: int) -> dict[str, Any]:
        return {"column": row if row % 2 else "text"}


class NumbersAsIds(LoopedTask):
    def example_id(self, row: int) -> Any:
        return row


class NoCheckpoints(LoopedTask):
    def checkpoints(self) -> list[Checkpoint]:
        return []


class SameNames(LoopedTask):
    def checkpoints(self) -> list[Checkpoint]:
        return [Checkpoint(name="step-0", learning_rate=1)] * 2


class OtherModels(LoopedTask):
    def model(self, checkpoint: Checkpoint) -> Any:
        return make_model(InjectedModel, dim=12 + 4 * int(checkpoint.name[-1]))


class TooFewLosses(LoopedTask):
    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        return super().losses(model, batch)[1:]


class RandomLoops(LoopedTask):
    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        model.num_steps = 3 if len(batch["labels"]) == 2 else 5
        return super().losses(model, batch)


@pytest.mark.parametrize(
    ("task", "error", "text"),
    [
        (NoExamples, TaskError, "examples.. is empty"),
        (TwiceTheSame, TaskError, r"id '0' is that of rows \[0, 30\]"),
        (MixedMetadata, TaskError, "metadata can't be stored: .* each column of metadata values of one type"),
        (NumbersAsIds, TaskError, "can't be stored: .* example_id and describe must return text"),
        (NoCheckpoints, TaskError, "checkpoints.. is empty"),
        (SameNames, TaskError, r"names are \['step-0', 'step-0'\]"),
        (OtherModels, TaskError, "'step-1' has other loop parameters than 'step-0'"),
        (TooFewLosses, ValueError, r"losses gave 1 values for 2 examples"),
        (RandomLoops, ValueError, "from row 0 ran 5 steps, the first ones ran 3"),
    ],
)
def test_a_task_that_breaks_its_contract_is_told_so(tmp_path: Path, task: Any, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        build(tmp_path / "bad.index", task(count=COUNT))
    assert not (tmp_path / "bad.index" / "manifest.json").exists()


def test_exact_gradients_build_no_index(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="width is None"):
        build(tmp_path / "exact.index", config=SketchConfig(width=None))


def test_progress_shows_rate_and_time_left(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build(tmp_path / "shown.index", progress=True)
    shown = capfd.readouterr().err
    for text in ("sketching examples, 4 of 4 blocks stored", "50/50", "indexing steps", "5/5", "left"):
        assert text in shown
