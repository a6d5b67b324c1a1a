"""The ways to get the gradients of a batch that are compared: a plain step's, ours and the reference's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from loopsway.indexer import SketchConfig, StepSketcher
from loopsway.indexer.sketches.coding import code_examples, row_bytes

from .looped_gpt import GPTTask
from .reference import reference_features

FACTOR_AND_NORM_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to get a batch's gradients.

    Attributes:
        tool: "plain", a forward and backward that gives every parameter's gradient of the summed losses; "ours"; or
            "reference".
        size: W of ours, m of the reference; None: exact gradients.
        bits: of a stored number of ours.
    """

    tool: str
    size: int | None = None
    bits: int = 32

    def __str__(self) -> str:
        if self.tool == "plain":
            return "plain step"
        if self.size is None:
            return f"{self.tool}, exact"
        if self.tool == "reference":
            return f"reference, m={self.size}"
        return f"ours, W={self.size}, {self.bits} bit{'s' * (self.bits > 1)}"

    def example_bytes(self, num_tensors: int, num_entries: int, num_steps: int) -> int:
        """Stored of an example: a row for each step, and one for the total in ours, which has a factor and a norm.

        Args:
            num_tensors: of the loop's parameters.
            num_entries: of them all.
            num_steps: S.
        """
        if self.tool == "plain":
            return 0
        if self.size is None:
            return 4 * num_steps * num_entries
        if self.tool == "reference":
            return 4 * num_steps * num_tensors * self.size
        return (num_steps + 1) * (row_bytes(self.size, self.bits) + FACTOR_AND_NORM_BYTES)

    @contextmanager
    def opened(self, task: GPTTask, model: nn.Module) -> Iterator[Callable[[Tensor], Any]]:
        """What takes a batch; the reference hooks the model while it is open."""
        if self.tool == "plain":
            yield lambda batch: plain_step(task, model, batch)
        elif self.tool == "ours":
            sketcher = StepSketcher(model, task.loop, SketchConfig(width=self.size, bits=self.bits))
            if self.size is None:
                yield lambda batch: sketcher.sketch(task.losses, batch)
            else:
                yield lambda batch: code_examples(sketcher.sketch(task.losses, batch), seed=0, bits=self.bits)
        else:
            with reference_features(task.losses, model, task.body, self.size) as features:
                yield lambda batch: features([batch])


def plain_step(task: GPTTask, model: nn.Module, batch: Tensor) -> None:
    model.zero_grad()
    task.losses(model, batch).sum().backward()
