"""Errors of our influences and the reference's against exact ones, for what is stored of an example's step.

N examples, S steps, W width, P entries of the loop's gradient, m the reference's floats for each parameter tensor.

As in the paper (Kaissis et al. 2026), a training set is compared with itself: the error is that of the block
[N, N, S] of influences of every example on every example at each step, the diagonal included, relative to the exact
block (Frobenius norm), over several seeds of the hashes. The side that asks is float32, as in a search.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from looped_gpt import GPTTask
from measurement import markdown_table, mean_and_deviation
from sdi import ProjectedTracInSDI
from sdi.estimators import compute_query_sdi
from sketch_models import Workload
from torch import Tensor, nn

from loopsway.indexer import SketchConfig, StepSketcher
from loopsway.indexer.sketches.coding import decode, encode, rotate, row_bytes

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


class SelfInfluence:
    """One trained model and the exact influences of its examples on one another.

    Attributes:
        truth: [N, N, S].
        total_norms: [N], of each example's gradient, all steps added.
        step_norms: [N, S], of each step's.
    """

    def __init__(self, extent: Extent, texts: Sequence[str]) -> None:
        self.extent = extent
        self.task = extent.workload.task(texts, training_steps=extent.training_steps)
        self.model = self.task.model(self.task.checkpoints()[0])
        size = extent.workload.shape.batch
        self.batches = [
            self.task.collate(texts[start : min(start + size, extent.num_examples)])
            for start in range(0, extent.num_examples, size)
        ]
        self._exact = ready_sketcher(self.task, self.model, SketchConfig(width=None), self.batches[0])
        self.shapes = self._exact.parameters
        self.totals = torch.cat([steps.sum(1) for steps in self.step_gradients()])  # [N, P]
        parts, norms = [], []
        for steps in self.step_gradients():
            parts.append(_query_step(self.totals, steps))
            norms.append(torch.linalg.vector_norm(steps, dim=2))
        self.truth, self.step_norms = torch.cat(parts, dim=1), torch.cat(norms)
        self.total_norms = torch.linalg.vector_norm(self.totals, dim=1)

    def step_gradients(self) -> Iterator[Tensor]:
        """Exact ones, [B, S, P], batch after batch: all at once may not fit in memory."""
        for batch in self.batches:
            yield self._exact.sketch(self.task.losses, batch)

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
            config = SketchConfig(width=width, seed=seed)
            sketcher = ready_sketcher(self.task, self.model, config, self.batches[0])
            steps = torch.cat([rotate(sketcher.sketch(self.task.losses, batch), seed) for batch in self.batches])
            totals = steps.sum(1)
            for each, row in rows.items():
                coded = encode(totals, each)
                stored = torch.from_numpy(decode(coded.codes, coded.factors, each))
                row.errors.append(self._error(_query_step(stored, steps)))
        return list(rows.values())

    def reference_row(self, projection: int) -> Row:
        floats = projection * len(self.shapes)
        row = Row(name=f"reference, m={projection}", bits=32, floats=floats, size_bytes=4 * floats)
        for seed in range(self.extent.num_seeds):
            model = copy.deepcopy(self.model)
            estimator = ProjectedTracInSDI(
                model=model,
                target_modules=model.get_submodule(self.task.body),
                projection_size=projection,
                seed=seed,
            )
            features = estimator.featurize_loader(loader=self.batches, loss_fn=self.task.losses)
            estimator.close()
            row.errors.append(self._error(compute_query_sdi(train=features, query=features)))
        return row

    def _error(self, estimate: Tensor) -> float:
        return float((estimate - self.truth).norm() / self.truth.norm())


def ready_sketcher(task: GPTTask, model: nn.Module, config: SketchConfig, batch: Tensor) -> StepSketcher:
    """One that has learned the model from two examples: from a whole batch that takes some ten plain steps."""
    sketcher = StepSketcher(model, task.loop, config)
    sketcher.sketch(task.losses, batch[:2])
    return sketcher


def _query_step(totals: Tensor, steps: Tensor) -> Tensor:
    """[N, P] and [Q, S, P] give [N, Q, S]."""
    return (totals @ steps.flatten(0, 1).T).unflatten(1, steps.shape[:2])


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
