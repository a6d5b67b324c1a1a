"""From a torch model and a batch to each example's gradients as numpy arrays, for a server that has no such model.

B examples, T terms of a sum (tokens), I inputs, O outputs. Gradients are seen as for a sketch; each keeps its cheapest
exact form: factors for linear uses, rows for look-ups, entries for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from loopsway.wire import DenseGradient, FactoredGradient, GradientPiece, QueryGradients, RowGradient

from ..config import Loop, SketchConfig
from ..gradients.forms import Dense, Gradient, OuterProduct, TableRows, multiplied_out
from ..gradients.losses import Losses
from .sketcher import StepSketcher

CHECK_WIDTH = 1024  # of the sketches that the first run is checked with


class GradientRecorder:
    """A sink that keeps what it is given, example by example.

    Args:
        checkpoint: whose weights ran.
        batch: B.

    Attributes:
        values: each example's pieces.
    """

    def __init__(self, checkpoint: str, batch: int) -> None:
        self._checkpoint = checkpoint
        self.values: list[list[GradientPiece]] = [[] for _ in range(batch)]

    def add(self, parameter: str, step: int, gradient: Gradient) -> None:
        where: dict[str, Any] = {"checkpoint": self._checkpoint, "parameter": parameter, "step": step}
        match gradient:
            case OuterProduct(left, right, _):
                (_, terms, outputs), inputs = left.shape, right.shape[2]
                if terms * (outputs + inputs) >= outputs * inputs:  # multiplied out, it is smaller
                    self._add_dense(where, multiplied_out(gradient, (outputs, inputs)), 0)
                    return
                for pieces, g, a in zip(self.values, _arrays(left), _arrays(right), strict=True):
                    pieces.append(FactoredGradient(**where, output_gradients=g, inputs=a))
            case TableRows(rows, values):
                for pieces, at, each in zip(self.values, rows.cpu().numpy(), _arrays(values), strict=True):
                    pieces.append(RowGradient(**where, rows=at.copy(), values=each))
            case Dense(values, start):
                self._add_dense(where, values, start)

    def _add_dense(self, where: Mapping[str, Any], values: Tensor, start: int) -> None:
        for pieces, each in zip(self.values, _arrays(values), strict=True):
            pieces.append(DenseGradient(**where, values=each, start=start))


def query_gradients(models: Mapping[str, nn.Module], loop: Loop, losses: Losses, batch: Any) -> list[QueryGradients]:
    """Each example's gradients, as `loopsway.client.Client.sketch_gradients` sends them.

    The first batch of each model is checked against plain autograd, which costs one more run.

    Args:
        models: in eval mode, by the names of the index's checkpoints, all of them.
        loop: the index's.
        losses: `losses(model, batch)` gives each example's own loss, [B].
        batch: for `losses`, on the models' device.

    Raises:
        ValueError: no models, or the losses or a model break what attribution needs; the text says what.
    """
    if not models:
        raise ValueError("models is empty; give the model of each checkpoint, by its name")
    ran = [_recorded(name, model, loop, losses, batch) for name, model in models.items()]
    counts = sorted({num_steps for num_steps, _ in ran})
    if len(counts) > 1:
        raise ValueError(f"the models ran different numbers of steps, {counts}: all checkpoints must run the same")
    by_example = zip(*(pieces for _, pieces in ran), strict=True)
    return [
        QueryGradients(num_steps=counts[0], pieces=tuple(piece for pieces in each for piece in pieces))
        for each in by_example
    ]


def _recorded(
    name: str, model: nn.Module, loop: Loop, losses: Losses, batch: Any
) -> tuple[int, list[list[GradientPiece]]]:
    """The number of slots, and each example's pieces."""
    sketcher = StepSketcher(model, loop, SketchConfig(width=CHECK_WIDTH))
    sketcher.run(losses, batch)
    captured = sketcher.captured(losses, batch, lambda size, _: GradientRecorder(name, size))
    return captured.num_steps + 2 * loop.outside, captured.values


def _arrays(values: Tensor) -> NDArray[np.float32]:
    """A copy: what it is a view of would stay as long."""
    return values.float().cpu().numpy().copy()
