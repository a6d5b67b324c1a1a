"""An example that is not finite, or that raises, is named; one that is not finite can be skipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from looped import LoopedTask
from loopsway.indexer import (
    Checkpoint,
    ExampleSketcher,
    NonFiniteExampleError,
    SketchConfig,
    UnknownExampleError,
    open_index,
    verify_index,
)

from .conftest import BATCH_SIZE, BLOCK_ROWS, CONFIG, COUNT, assert_same, build, contents


class BadTask(LoopedTask):
    """Some examples have a loss, others a gradient that is not finite, at the second checkpoint."""

    bad_losses: tuple[int, ...] = ()
    bad_gradients: tuple[int, ...] = ()
    raising: tuple[int, ...] = ()

    def collate(self, examples: Any) -> dict[str, Tensor]:
        rows = [self._examples.index(example) for example in examples]
        return {**super().collate(examples), "row": torch.tensor(rows)}

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        values = super().losses(model, batch)
        if set(self.raising) & set(batch["row"].tolist()):
            raise RuntimeError("the tokenizer is out of words")
        if model.name == "step-0":
            return values
        is_bad_loss, is_bad_gradient = (
            torch.isin(batch["row"], torch.tensor(rows)) for rows in (self.bad_losses, self.bad_gradients)
        )
        root = torch.where(is_bad_gradient, values - values.detach(), 1).sqrt()  # of 0 it has an infinite gradient
        values = values + torch.where(is_bad_gradient, root, 0)
        return values / torch.where(is_bad_loss, 0.0, 1.0)

    def model(self, checkpoint: Checkpoint) -> Any:
        model: Any = super().model(checkpoint)
        model.name = checkpoint.name
        return model


def bad_task(**rows: tuple[int, ...]) -> BadTask:
    task = BadTask(count=COUNT)
    for name, value in rows.items():
        setattr(task, name, value)
    return task


def unique_rows() -> list[int]:
    """Rows of examples that no other example equals."""
    examples = LoopedTask(count=COUNT).examples()
    return [row for row, example in enumerate(examples) if examples.count(example) == 1]


UNIQUE = unique_rows()
FIRST, INSIDE, OTHER = UNIQUE[0], UNIQUE[len(UNIQUE) // 2], UNIQUE[-1]


@pytest.mark.parametrize("kind", ["bad_losses", "bad_gradients"])
@pytest.mark.parametrize("row", [FIRST, INSIDE, OTHER])
def test_a_build_stops_at_an_example_that_is_not_finite(tmp_path: Path, kind: str, row: int) -> None:
    what = {"bad_losses": "loss", "bad_gradients": "gradient"}[kind]
    text = (
        rf"the {what} at checkpoint 'step-1' of example 'train/{row}' \(row {row}\) is not finite; .*--nonfinite skip"
    )
    path = tmp_path / "bad.index"
    with pytest.raises(NonFiniteExampleError, match=text):
        build(path, bad_task(**{kind: (row,)}))
    stored = len(list(path.glob("generations/*/blocks/*.json")))
    assert stored == row // BLOCK_ROWS, "finished blocks are kept"
    index = build(path, bad_task(**{kind: (row,)}), nonfinite="skip")
    assert index.skipped == {f"train/{row}": f"{what} at checkpoint 'step-1' is not finite"}
    assert verify_index(path, progress=False) == []


def test_skipped_examples_are_in_no_answer_and_the_others_are_as_they_were(whole_index: Path, tmp_path: Path) -> None:
    bad = {FIRST: "loss", INSIDE: "gradient", OTHER: "gradient"}
    task = bad_task(bad_losses=(FIRST,), bad_gradients=(INSIDE, OTHER))
    index, whole = build(tmp_path / "bad.index", task, nonfinite="skip"), open_index(whole_index)
    assert (index.num_examples, index.num_skipped) == (COUNT, 3)
    assert index.skipped == {
        f"train/{row}": f"{what} at checkpoint 'step-1' is not finite" for row, what in bad.items()
    }
    kept = [f"train/{row}" for row in range(COUNT) if row not in bad]
    queries = np.random.default_rng(0).standard_normal((4, 256)).astype(np.float32)
    ranking = index.search(queries, k=COUNT)
    for influencers in (ranking.total, *ranking.steps):
        ids = {*influencers.proponents.example_ids, *influencers.opponents.example_ids}
        assert ids == set(kept)
    got, want = index.trajectories(queries, kept), whole.trajectories(queries, kept)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3 * float(np.abs(want).max()))
    with pytest.raises(UnknownExampleError, match=rf"'train/{INSIDE}' was skipped .*: its gradient at checkpoint"):
        index.trajectories(queries, [f"train/{INSIDE}"])
    finite = [LoopedTask(count=COUNT).examples()[row] for row in range(COUNT) if row not in bad]
    sketches = ExampleSketcher(LoopedTask(count=COUNT), CONFIG, batch_size=BATCH_SIZE).sketch(finite)
    np.testing.assert_allclose(index.mean_losses(), sketches.losses.mean(1), rtol=1e-5)


def test_a_batch_and_a_block_without_a_finite_example_are_zeros(tmp_path: Path) -> None:
    rows = tuple(range(BLOCK_ROWS, 2 * BLOCK_ROWS))
    equal = {LoopedTask(count=COUNT).examples()[row] for row in rows}
    skipped = {f"train/{row}" for row, each in enumerate(LoopedTask(count=COUNT).examples()) if each in equal}
    task = bad_task()
    task.bad_losses = tuple(task.examples().index(task.examples()[row]) for row in rows)
    index = build(tmp_path / "bad.index", task, nonfinite="skip")
    assert set(index.skipped) == skipped
    assert index.steps_without_gradient == ()
    assert verify_index(index.path, progress=False) == []


def test_nothing_finite_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteExampleError, match="no example has a finite loss and gradient"):
        build(tmp_path / "bad.index", bad_task(bad_losses=tuple(range(COUNT))), nonfinite="skip")


def test_the_same_examples_are_skipped_when_the_build_is_cut(tmp_path: Path) -> None:
    task = bad_task(bad_losses=(FIRST,), bad_gradients=(OTHER,))
    with pytest.raises(NonFiniteExampleError):
        build(tmp_path / "cut.index", bad_task(bad_losses=(OTHER,)))
    build(tmp_path / "cut.index", bad_task(bad_losses=(OTHER,)), nonfinite="skip")
    build(tmp_path / "uncut.index", bad_task(bad_losses=(OTHER,)), nonfinite="skip")
    assert_same(contents(tmp_path / "cut.index"), contents(tmp_path / "uncut.index"))
    assert build(tmp_path / "both.index", task, nonfinite="skip").num_skipped == 2


def test_a_batch_that_raises_names_the_example(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of words") as caught:
        build(tmp_path / "bad.index", bad_task(raising=(INSIDE,)))
    first = INSIDE // BATCH_SIZE * BATCH_SIZE
    assert caught.value.__notes__ == [
        f"raised by the batch of examples 'train/{first}' to 'train/{first + 7}' (rows {first} to {first + 7})",
        f"example 'train/{INSIDE}' (row {INSIDE}) raises it alone",
    ]


class CollateRaises(LoopedTask):
    def collate(self, examples: Any) -> Any:
        if self._examples[INSIDE] in examples:
            raise KeyError("text")
        return super().collate(examples)


class ReadingRaises(LoopedTask):
    def examples(self) -> Any:
        examples = super().examples()

        class Reader:
            def __len__(self) -> int:
                return len(examples)

            def __getitem__(self, row: int) -> Any:
                if row == INSIDE:
                    raise OSError("the file is gone")
                return examples[row]

        return Reader()


@pytest.mark.parametrize(("task", "error"), [(CollateRaises, KeyError), (ReadingRaises, OSError)])
def test_an_example_that_can_not_be_read_is_named(tmp_path: Path, task: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        build(tmp_path / "bad.index", task(count=COUNT), SketchConfig(width=64))
    assert f"example 'train/{INSIDE}' (row {INSIDE})" in caught.value.__notes__[0]
