"""Errors of our influences and the reference's against exact ones, for what is stored of an example's step.

N examples, W width, m the reference's floats for each parameter tensor. What an error is of, `loopsway.experiments.
accuracy` says; here it is one for each seed of the hashes.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from measurement import markdown_table, mean_and_deviation
from sketch_models import Workload
from torch import Tensor, nn

from loopsway.experiments import accuracy
from loopsway.experiments.looped_gpt import GPTTask
from loopsway.indexer import SketchConfig, StepSketcher
from loopsway.indexer.sketches.coding import row_bytes

FACTOR_AND_NORM_BYTES = 8
BITS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured.

    Attributes:
        workload: model and batch.
        num_examples: N.
        training_steps: before gradients are taken.
        num_seeds: of the hashes.
        widths: our W.
        projections: the reference's m.
    """

    workload: Workload
    num_examples: int
    training_steps: int
    num_seeds: int
    widths: tuple[int, ...]
    projections: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"{self.workload}; {self.num_examples} x {self.num_examples} examples, "
            f"{self.training_steps} steps of training, {self.num_seeds} seeds"
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to store an example's step, and its errors, one for each seed.

    Attributes:
        name: in a table.
        bits: of a stored number.
        floats: numbers stored.
        size_bytes: of them all, with factor and norm in ours.
        errors: relative.
    """

    name: str
    bits: int
    floats: int
    size_bytes: int
    errors: list[float] = field(default_factory=list)

    @property
    def error(self) -> float:
        return statistics.mean(self.errors)

    def cells(self) -> tuple[str, ...]:
        error = mean_and_deviation(self.errors)
        return (self.name, str(self.bits), f"{self.floats:,}", f"{self.size_bytes:,}", error)


class SelfInfluence(accuracy.SelfInfluence):
    """Of one trained model's examples, with every way to store them as a row."""

    def __init__(self, extent: Extent, texts: Sequence[str]) -> None:
        self.extent = extent
        task = extent.workload.task(texts, training_steps=extent.training_steps)
        size, examples = extent.workload.shape.batch, texts[: extent.num_examples]
        batches = [task.collate(examples[start : start + size]) for start in range(0, len(examples), size)]
        super().__init__(task, task.model(task.checkpoints()[0]), task.body, batches, batches[0][:2])

    def our_rows(self, width: int, bits: Sequence[int] = BITS) -> list[Row]:
        rows = {
            each: Row(
                name=f"ours, W={width}",
                bits=each,
                floats=width,
                size_bytes=row_bytes(width, each) + FACTOR_AND_NORM_BYTES,
            )
            for each in bits
        }
        for seed in range(self.extent.num_seeds):
            for each, error in self.our_errors(width, bits, seed).items():
                rows[each].errors.append(error)
        return list(rows.values())

    def reference_row(self, projection: int) -> Row:
        floats = projection * len(self.shapes)
        errors = [self.reference_error(projection, seed) for seed in range(self.extent.num_seeds)]
        return Row(name=f"reference, m={projection}", bits=32, floats=floats, size_bytes=4 * floats, errors=errors)


def ready_sketcher(task: GPTTask, model: nn.Module, config: SketchConfig, batch: Tensor) -> StepSketcher:
    """One that has learned the model from two examples: from a whole batch that takes some ten plain steps."""
    sketcher = StepSketcher(model, task.loop, config)
    sketcher.sketch(task.losses, batch[:2])
    return sketcher


def error_tables(influence: SelfInfluence) -> str:
    """Every way to store a step by its bytes; then each of the reference's beside ours."""
    extent = influence.extent
    reference = [influence.reference_row(projection) for projection in extent.projections]
    ours = [row for width in extent.widths for row in influence.our_rows(width)]
    header = ("sketch", "bits", "floats", "bytes", "relative error")
    rows = sorted([*reference, *ours], key=lambda row: (row.size_bytes, row.floats))
    tables = (markdown_table(header, [row.cells() for row in rows]), comparison_table(reference, ours))
    return "\n\n".join(tables)


def comparison_table(reference: Sequence[Row], ours: Sequence[Row]) -> str:
    """Beside each of the reference's rows: our error with no more floats, and our fewest bytes with no more error."""
    rows = []
    for row in reference:
        wide = [mine for mine in ours if mine.bits == 32 and mine.floats <= row.floats]
        close = [mine for mine in ours if mine.error <= row.error]
        cells = ["-"] * 4
        if wide:
            equal = max(wide, key=lambda mine: mine.floats)
            cells[:2] = f"{equal.error:.3f} ({equal.floats:,})", f"{equal.error / row.error:.2f}"
        if close:
            small = min(close, key=lambda mine: mine.size_bytes)
            cells[2:] = (
                f"{small.size_bytes:,} ({small.name}, {small.bits}-bit)",
                f"1/{row.size_bytes / small.size_bytes:.0f}",
            )
        rows.append((row.name, f"{row.floats:,}", f"{row.error:.3f}", *cells))
    header = ("reference", "floats", "error", "our error at no more floats", "ours / reference's",
              "our fewest bytes at no more error", "of the reference's bytes")  # fmt: skip
    return markdown_table(header, rows)
