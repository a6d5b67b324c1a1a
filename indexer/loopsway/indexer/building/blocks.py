"""Sketches one block of a task's examples: the unit of work of a build, the same whoever runs it.

B examples of a block, K checkpoints, S steps, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from ..gradients.losses import NonFiniteError
from ..sketches.coding import Codes, code_examples, code_shape
from ..sketches.features import ExampleSketcher, ExampleSketches
from ..store.entries import CodedExamples, Skipped
from ..store.manifest import Plan
from ..task import Task

NonFinite = Literal["stop", "skip"]


class NonFiniteExampleError(ValueError):
    """An example's loss or gradient is infinite or not a number, and the build was told to stop at such."""


class BlockSketcher:
    """Sketches and codes blocks of a plan's examples.

    Args:
        task: whose examples they are.
        sketcher: of the task.
        nonfinite: what to do with an example without a finite loss or gradient: "stop", or "skip" it, which leaves
            zeros in its row and its reason beside them.
    """

    def __init__(self, task: Task, sketcher: ExampleSketcher, *, nonfinite: NonFinite) -> None:
        self._task, self._sketcher, self._nonfinite = task, sketcher, nonfinite
        self._examples = task.examples()

    def coded(self, plan: Plan, block: int, on_batch: Callable[[int], None]) -> CodedExamples:
        """A block, in the plan's batches.

        Args:
            plan: of the build.
            block: its number.
            on_batch: called after each batch with its number of examples.

        Raises:
            NonFiniteExampleError: an example is not finite and `nonfinite` is "stop".
            ValueError: the examples can't be attributed, or run another number of steps than the plan's.
        """
        rows, parts = plan.rows_of(block), []
        for start in range(rows.start, rows.stop, plan.batch_size):
            batch = range(start, min(start + plan.batch_size, rows.stop))
            parts.append(self._coded_batch(plan, batch))
            on_batch(len(batch))
        return CodedExamples.joined(parts)

    def probe(self) -> ExampleSketches:
        """Sketches of the first two examples, or of the first ones that are finite, if others may be skipped."""
        count = len(self._examples)
        for start in range(0, count, 2):
            sketches, _, _ = self._sketched(range(start, min(start + 2, count)))
            if sketches is not None:
                return sketches
        raise NonFiniteExampleError("no example has a finite loss and gradient: there is nothing to index")

    def _coded_batch(self, plan: Plan, rows: range) -> CodedExamples:
        sketches, kept, skipped = self._sketched(rows)
        if sketches is None:
            return _empty(plan, len(rows), skipped)
        if sketches.values.shape[1] != plan.num_steps:
            raise ValueError(
                f"the examples from row {rows.start} ran {sketches.values.shape[1]} steps, the first ones ran "
                f"{plan.num_steps}: all examples of an index must run the same number; fix the task's loop count"
            )
        config = plan.config
        steps, total = code_examples(sketches.values, seed=config.seed, bits=config.bits, rotations=config.rotations)
        coded = CodedExamples(
            steps=steps,
            total=total,
            losses=sketches.losses.numpy(),
            steps_without_gradient=sketches.steps_without_gradient,
            skipped=skipped,
        )
        return coded if not skipped else _placed(plan, coded, [row - rows.start for row in kept], len(rows))

    def _sketched(self, rows: range) -> tuple[ExampleSketches | None, list[int], tuple[Skipped, ...]]:
        """Sketches of the finite examples among these rows, which those are, and the others."""
        kept, skipped = list(rows), []
        while kept:
            try:
                sketches = self._sketcher.sketch([self._example(row) for row in kept])
                return sketches, kept, tuple(skipped)
            except NonFiniteError as error:
                bad = [kept[position] for position in error.positions]
                if self._nonfinite == "stop":
                    raise NonFiniteExampleError(
                        f"the {error.reason} of example {self._task.example_id(bad[0])!r} (row {bad[0]}) is not "
                        'finite; mend or leave out the example, or build with nonfinite="skip" (--nonfinite skip): '
                        "what is done is kept"
                    ) from error
                skipped += [Skipped(row=row, reason=f"{error.reason} is not finite") for row in bad]
                kept = [row for row in kept if row not in bad]
            except Exception as error:
                self._name_culprit(kept, error)
                raise
        return None, [], tuple(sorted(skipped, key=lambda each: each.row))

    def _example(self, row: int) -> Any:
        try:
            return self._examples[row]
        except Exception as error:
            error.add_note(f"reading example {self._task.example_id(row)!r} (row {row}) raised this")
            raise

    def _name_culprit(self, rows: Sequence[int], error: Exception) -> None:
        """Notes on the error which example raises it alone, if one does."""
        if isinstance(error, torch.OutOfMemoryError) or getattr(error, "__notes__", None):
            return
        first, last = (self._task.example_id(row) for row in (rows[0], rows[-1]))
        error.add_note(f"raised by the batch of examples {first!r} to {last!r} (rows {rows[0]} to {rows[-1]})")
        for row in rows if len(rows) > 1 else ():
            try:
                self._sketcher.sketch([self._example(row)])
            except Exception as alone:
                if type(alone) is type(error):
                    error.add_note(f"example {self._task.example_id(row)!r} (row {row}) raises it alone")
                    return


def _placed(plan: Plan, coded: CodedExamples, places: Sequence[int], count: int) -> CodedExamples:
    """The rows of these places among `count`, with zeros for the skipped ones."""
    empty, at = _empty(plan, count, coded.skipped), np.array(places)
    by_step = (at[:, None] * plan.num_steps + np.arange(plan.num_steps)).ravel()
    for into, out, rows in ((empty.steps, coded.steps, by_step), (empty.total, coded.total, at)):
        into.codes[rows], into.factors[rows], into.norms[rows] = out.codes, out.factors, out.norms
    empty.losses[:, at] = coded.losses
    return CodedExamples(
        steps=empty.steps,
        total=empty.total,
        losses=empty.losses,
        steps_without_gradient=coded.steps_without_gradient,
        skipped=coded.skipped,
    )


def _empty(plan: Plan, count: int, skipped: tuple[Skipped, ...]) -> CodedExamples:
    """Zeros for examples all of which are skipped."""
    return CodedExamples(
        steps=_zeros(plan, count * plan.num_steps),
        total=_zeros(plan, count),
        losses=np.full((len(plan.checkpoints), count), np.nan, np.float32),
        steps_without_gradient=tuple(range(plan.num_steps)),
        skipped=skipped,
    )


def _zeros(plan: Plan, rows: int) -> Codes:
    length, kind = code_shape(plan.width, plan.config.bits)
    factors, norms = np.zeros((2, rows), np.float32)
    return Codes(codes=np.zeros((rows, length), kind), factors=factors, norms=norms)
