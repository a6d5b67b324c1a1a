"""Whatever the loop's shape, its step gradients are those of untied copies; what can't be right is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped import (
    MODELS,
    InjectedModel,
    Labelled,
    LoopedTask,
    RangeModel,
    collate,
    losses,
    make_examples,
    make_model,
)
from loops import LOOPS, Checkpointed, Hierarchical, SlowFirst, TruncatedCycles, UsedOutside
from loopsway.indexer import Checkpoint, ExampleSketcher, Loop, SketchConfig, StepSketcher, build_index
from untied import sketch_of, untied_gradients

EXACT, SKETCHED = SketchConfig(width=None), SketchConfig(width=512)
TOLERANCE = 1e-5


def check(model: nn.Module, loop: Loop, *, counts: tuple[int, ...] = (6, 1)) -> None:
    """Batches of these sizes through one sketcher, exact and sketched."""
    sketcher, coarse = StepSketcher(model, loop, EXACT), StepSketcher(model, loop, SKETCHED)
    for seed, count in enumerate(counts):
        batch = collate(make_examples(count, seed))
        want, names = untied_gradients(model, loop, losses, batch)
        got = sketcher.sketch(losses, batch)
        assert list(sketcher.parameters) == names
        assert got.shape == want.shape
        error = float((got - want).norm() / want.norm())
        assert error <= TOLERANCE, f"batch {seed} of {count}: relative error {error:.2g}"
        want = sketch_of(want, sketcher.parameters, SKETCHED)
        error = float((coarse.sketch(losses, batch) - want).norm() / want.norm())
        assert error <= TOLERANCE, f"batch {seed} of {count}: the sketch's relative error {error:.2g}"


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("kind", [*MODELS, *LOOPS])
def test_exact_step_gradients_equal_those_of_untied_parameters(kind: Any, outside: bool) -> None:
    check(make_model(kind), replace(kind.loop, outside=outside))


@pytest.mark.parametrize("kind", [*MODELS, *LOOPS])
def test_slots_inside_and_outside_sum_to_the_whole_models_gradient(kind: Any) -> None:
    model, batch = make_model(kind), collate(make_examples(1))
    sketcher = StepSketcher(model, replace(kind.loop, outside=True), EXACT)
    got = sketcher.sketch(losses, batch).sum((0, 1))
    parameters = dict(model.named_parameters())
    assert sketcher.parameters == {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    want = torch.autograd.grad(losses(model, batch).sum(), list(parameters.values()), materialize_grads=True)
    torch.testing.assert_close(got, torch.cat([part.flatten() for part in want]), rtol=1e-4, atol=1e-5)


def test_the_rows_before_and_after_hold_what_is_used_there() -> None:
    model = make_model(UsedOutside)
    sketcher = StepSketcher(model, UsedOutside.loop, EXACT)
    values = sketcher.sketch(losses, collate(make_examples(3)))
    sizes = [torch.Size(shape).numel() for shape in sketcher.parameters.values()]
    used = {
        name: [bool(slot.any()) for slot in part.unbind(1)]
        for name, part in zip(sketcher.parameters, values.split(sizes, dim=2), strict=True)
    }  # steps 0 and 1, before, after
    assert used["embed.weight"] == [False, False, True, True]
    assert used["head.weight"] == [False, False, False, True]
    assert used["body.out.weight"] == [True, True, True, False]
    assert used["body.norm1.weight"] == [True, True, False, True]
    assert used["scale"] == [True, False, True, False]  # used between two passes, it belongs to the one before


@pytest.mark.parametrize(("kind", "steps"), [(Hierarchical, 4), (SlowFirst, 2), (TruncatedCycles, 2)])
def test_the_first_of_the_body_to_be_entered_begins_a_step_unless_a_marker_does(kind: Any, steps: int) -> None:
    model = make_model(kind)
    assert StepSketcher(model, kind.loop, EXACT).sketch(losses, collate(make_examples(2))).shape[1] == steps


@pytest.mark.parametrize("kind", [RangeModel, TruncatedCycles])
def test_steps_under_no_grad_are_reported_and_zero(kind: Any) -> None:
    captured = StepSketcher(make_model(kind), kind.loop, EXACT).run(losses, collate(make_examples(4)))
    assert captured.steps_without_gradient == (0,)
    assert not captured.sink.values[:, 0].any()


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("span", ["layer", "step", "loop"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool, span: str, outside: bool) -> None:
    plain, recomputed = (make_model(Checkpointed, span=span, reentrant=r) for r in (None, reentrant))
    loop = replace(Checkpointed.loop, outside=outside)
    sketcher = StepSketcher(recomputed, loop, EXACT)
    for count in (4, 1):
        batch = collate(make_examples(count))
        want = untied_gradients(plain, loop, losses, batch)[0]
        got = sketcher.sketch(losses, batch)
        assert got.shape == want.shape
        assert float((got - want).norm() / want.norm()) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [InjectedModel, Hierarchical])
def test_autocast_gives_float32_gradients_as_good_as_its_forward(kind: Any, dtype: torch.dtype) -> None:
    """Both sides run the same low-precision forward and backward; only the batching differs, by some roundings."""

    def cast(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            scores = model(batch["tokens"])
        return F.cross_entropy(scores.float(), batch["labels"], reduction="none")

    model, batch = make_model(kind), collate(make_examples(6))
    want = untied_gradients(model, kind.loop, cast, batch, dtype=torch.float32)[0]
    full = untied_gradients(model, kind.loop, losses, batch)[0]
    got = StepSketcher(model, kind.loop, EXACT).sketch(cast, batch)
    assert got.dtype == torch.float32
    error, rounding = (float((x - y).norm() / full.norm()) for x, y in ((got, want), (want, full)))
    assert error <= 2 * torch.finfo(dtype).eps
    assert error <= rounding, f"error {error:.2g}, that of the low precision itself is {rounding:.2g}"


class Functional(nn.Module):
    """Dropout that no Dropout module does."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, self.training)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1 * self.training)


class Recurrence(nn.GRU):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input)[0]


RANDOM = {
    "Dropout": lambda: nn.Dropout(0.1),
    "AlphaDropout": lambda: nn.AlphaDropout(0.1),
    "functional": Functional,
    "of attention": Attention,
    "of a layer": lambda: nn.TransformerEncoderLayer(24, 2, 8, 0.1, batch_first=True),
    "of a recurrence": lambda: Recurrence(24, 24, 2, dropout=0.1, batch_first=True),
}


@pytest.mark.parametrize("name", RANDOM)
def test_dropout_is_refused_outside_eval(name: str) -> None:
    model = make_model(InjectedModel)
    model.block.mlp[1] = RANDOM[name]()
    sketcher = StepSketcher(model.eval(), model.loop, EXACT)
    sketcher.sketch(losses, collate(make_examples(3)))
    model.train()
    with pytest.raises(ValueError, match=r"(?i)dropout.*training mode.*eval\(\)"):
        sketcher.sketch(losses, collate(make_examples(3)))


class RandomCounts(LoopedTask):
    """Runs as many steps as the batch has tokens: a task whose loop count is not fixed."""

    def losses(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        model.num_steps = batch["tokens"].shape[1]
        return super().losses(model, batch)


class CountsByCheckpoint(LoopedTask):
    def model(self, checkpoint: Checkpoint) -> nn.Module:
        model: Any = super().model(checkpoint)
        model.num_steps = 3 if checkpoint.name == "step-0" else 5
        return model


def by_length(lengths: Sequence[int]) -> list[Labelled]:
    return [Labelled((1,) * length) for length in lengths]


def test_batches_of_different_step_counts_are_an_error_that_names_both() -> None:
    sketcher = ExampleSketcher(RandomCounts(), SketchConfig(width=256), batch_size=2)
    with pytest.raises(ValueError, match=r"different numbers of steps, \[3, 5\]"):
        sketcher.sketch(by_length([3, 3, 5, 5]))


def test_an_index_whose_blocks_run_different_step_counts_is_an_error_that_names_both(tmp_path: Path) -> None:
    task = RandomCounts(num_checkpoints=1)
    task._examples = by_length([3] * 4 + [5] * 4)
    with pytest.raises(ValueError, match=r"(?s)\b3\b.*\b5\b|\b5\b.*\b3\b"):
        build_index(task, tmp_path / "a.index", SketchConfig(width=256), block_rows=4, batch_size=4, progress=False)


def test_checkpoints_of_different_step_counts_are_an_error_that_names_both() -> None:
    sketcher = ExampleSketcher(CountsByCheckpoint(), SketchConfig(width=256))
    with pytest.raises(ValueError, match=r"'step-1' ran 5 steps, 'step-0' ran 3"):
        sketcher.sketch(make_examples(3))


def test_a_task_that_fixes_its_step_count_builds(tmp_path: Path) -> None:
    index = build_index(
        LoopedTask(count=8), tmp_path / "a.index", SketchConfig(width=256), block_rows=4, batch_size=4, progress=False
    )
    assert index.num_steps == 4
