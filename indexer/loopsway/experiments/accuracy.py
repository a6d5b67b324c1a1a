"""Errors of influences, ours and the reference's, against exact ones.

N examples, B of them in a batch, S steps, W width, P entries of the loop's gradient, m the reference's floats for each
parameter tensor.

As in the paper (Kaissis et al. 2026), examples are compared with themselves: the error is that of the block [N, N, S]
of influences of every example on every example at each step, the diagonal included, relative to the exact block
(Frobenius norm). The side that asks is float32, as in a search.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from sdi.estimators import compute_query_sdi
from torch import Tensor, nn

from loopsway.indexer import SketchConfig, StepSketcher, Task
from loopsway.indexer.sketches.coding import decode, encode
from loopsway.indexer.sketches.rotation import rotate

from .reference import reference_features

COLUMNS = 1 << 16  # of gradients, that are made float64 at once


class SelfInfluence:
    """The exact influences of some examples on one another.

    Args:
        task: whose losses and loop they are.
        model: on the batches' device.
        body: name of the module that is applied again and again.
        batches: of the examples.
        few: a batch of two, from which a sketcher learns the model: from many that takes some ten plain steps.

    Attributes:
        shapes: of the body's parameters, by name.
        totals: [N, P], each example's gradient, all steps added.
        total_norms: [N], of these.
        step_norms: [N, S], of each step's.
        truth: [N, N, S].
    """

    def __init__(self, task: Task, model: nn.Module, body: str, batches: Sequence[Any], few: Any) -> None:
        self._task, self._model, self._body, self._batches, self._few = task, model, body, batches, few
        self._exact = self._sketcher(SketchConfig(width=None))
        self.shapes = self._exact.parameters
        self.totals = torch.cat([steps.sum(1) for steps in self.step_gradients()])
        self.total_norms = torch.linalg.vector_norm(self.totals, dim=1)
        parts, norms = [], []
        for steps in self.step_gradients():
            parts.append(influences(self.totals, steps))
            norms.append(torch.linalg.vector_norm(steps, dim=2))
        self.truth, self.step_norms = torch.cat(parts, dim=1), torch.cat(norms)

    def step_gradients(self) -> Iterator[Tensor]:
        """Exact ones, [B, S, P], batch after batch: all at once may not fit in memory."""
        for batch in self._batches:
            yield self._exact.sketch(self._task.losses, batch)

    def our_errors(self, width: int, bits: Sequence[int], seed: int) -> dict[int, float]:
        """By the bits of a stored number."""
        sketcher = self._sketcher(SketchConfig(width=width, seed=seed))
        steps = torch.cat([rotate(sketcher.sketch(self._task.losses, batch), seed) for batch in self._batches])
        errors = {}
        for each in bits:
            coded = encode(steps.sum(1), each)
            stored = torch.from_numpy(decode(coded.codes, coded.factors, each))
            errors[each] = self._error(influences(stored.to(steps.device), steps))
        return errors

    def reference_error(self, projection: int | None, seed: int = 0) -> float:
        """With m floats for each parameter tensor; None: of its exact gradients, where rounding alone differs."""
        with reference_features(self._task.losses, self._model, self._body, projection, seed) as features:
            found = features(self._batches)
        return self._error(compute_query_sdi(train=found, query=found))

    def _sketcher(self, config: SketchConfig) -> StepSketcher:
        sketcher = StepSketcher(self._model, self._task.loop, config)
        sketcher.sketch(self._task.losses, self._few)
        return sketcher

    def _error(self, estimate: Tensor) -> float:
        return float((estimate - self.truth).norm() / self.truth.norm())


def influences(totals: Tensor, steps: Tensor) -> Tensor:
    """[N, P] and [Q, S, P] give [N, Q, S].

    They are added up in float64: a million products added up in float32 are wrong by some 1e-4.
    """
    flat = steps.flatten(0, 1)
    found = torch.zeros(len(totals), len(flat), dtype=torch.float64, device=totals.device)
    for left, right in zip(totals.split(COLUMNS, dim=1), flat.split(COLUMNS, dim=1), strict=True):
        found += left.double() @ right.double().T
    return found.float().unflatten(1, steps.shape[:2])
