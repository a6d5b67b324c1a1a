"""Sketches queries that come as gradients, piece by piece, with an index's own hashes: no model runs.

S steps, W width, T terms of a sum, I inputs, O outputs, D features. A piece is checked, added and forgotten: what stays
is one sketch. The sketch of a query's pieces is that of the query itself, to rounding, because sketching is linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from loopsway.wire import DenseGradient, FactoredGradient, GradientPiece, RowGradient

from ..config import Checkpoint, SketchConfig
from ..gradients.forms import Dense, Gradient, OuterProduct, TableRows
from .device_hash import DeviceHash
from .sketch import Sketches

SHOWN = 5  # names in a message


class GradientError(ValueError):
    """A piece is no gradient of the index's parameters; the text says what was expected."""


Scales = Mapping[str, Tensor]


class GradientSketcher:
    """Begins sketches of queries.

    Args:
        shapes: of the index's parameters, by name.
        checkpoints: of the index.
        config: of the index.
        hashes: of each checkpoint's parameters, by name and name.
        scales_of: gives a checkpoint's scales of an optimizer-aware index, by name, for each piece; none are kept.
            None: of a plain index; then it is thread-safe.
        device: of the hashes.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        checkpoints: Sequence[Checkpoint],
        config: SketchConfig,
        hashes: Mapping[str, Mapping[str, DeviceHash]],
        *,
        scales_of: Callable[[str], Scales | None] | None = None,
        device: torch.device,
    ) -> None:
        assert config.width is not None
        self.shapes, self.config, self.width, self.device = dict(shapes), config, config.width, device
        self.factors = {each.name: math.sqrt(each.learning_rate) for each in checkpoints}
        self.hashes, self.scales_of = hashes, scales_of

    @classmethod
    def without_model(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        checkpoints: Sequence[Checkpoint],
        config: SketchConfig,
        *,
        device: str = "cpu",
    ) -> GradientSketcher:
        """From what an index says of itself; draws the hashes of every checkpoint.

        Raises:
            GradientError: the index is optimizer-aware: its scales are in the task's checkpoints alone.
        """
        if config.optimizer_aware:
            raise GradientError(
                "the index is optimizer-aware, and the second moments that scale its gradients are in the task's "
                "checkpoints alone: sketch where the task is (ExampleSketcher.gradient_sketcher) and send the sketch"
            )
        assert config.width is not None
        place, hashes = torch.device(device), {}
        for each in checkpoints:
            hashes[each.name] = DeviceHash.of_parameters(
                shapes, width=config.width, seed=config.seed, checkpoint=each.name, device=place
            )
        return cls(shapes, checkpoints, config, hashes, device=place)

    def begin(self, num_steps: int) -> GradientSketch:
        """The sketch of a query of so many steps, empty."""
        return GradientSketch(self, num_steps)


class GradientSketch:
    """One query's sketch as it grows. One caller at a time."""

    def __init__(self, sketcher: GradientSketcher, num_steps: int) -> None:
        self._sketcher, self._num_steps = sketcher, num_steps
        self._values = torch.zeros(num_steps, sketcher.width, device=sketcher.device)
        self._checkpoint: str | None = None  # whose gradients `_sketches` holds
        self._sketches: Sketches | None = None

    def add(self, piece: GradientPiece) -> None:
        """Adds a piece; cheapest when pieces of one checkpoint, and in it of one step, come one after another.

        Raises:
            GradientError: the index has no such checkpoint, parameter or step, or the piece does not fit it.
        """
        sketcher = self._sketcher
        if piece.checkpoint not in sketcher.factors:
            raise GradientError(f"there is no checkpoint {piece.checkpoint!r}, only {_some(sketcher.factors)}")
        shape = sketcher.shapes.get(piece.parameter)
        if shape is None:
            raise GradientError(
                f"there is no parameter {piece.parameter!r} in the index's loop, only {_some(sketcher.shapes)}"
            )
        if not 0 <= piece.step < self._num_steps:
            raise GradientError(f"step is {piece.step}, expected 0 to {self._num_steps - 1} of a query of "
                                f"{self._num_steps} steps")  # fmt: skip
        gradient = _gradient(piece, shape, sketcher.device)
        self._of(piece.checkpoint).add(piece.parameter, piece.step, gradient)
        if sketcher.scales_of is not None:  # they may have to leave memory before the next piece comes
            self._collect()

    def finish(self) -> NDArray[np.float32]:
        """The sketch, [S, W].

        Raises:
            GradientError: the sum of the pieces is beyond float32.
        """
        self._collect()
        values = self._values.cpu().numpy()
        if not np.isfinite(values).all():
            raise GradientError("the gradients add up to numbers beyond float32: scale the loss down")
        return values

    def _of(self, checkpoint: str) -> Sketches:
        """The sketch of this checkpoint's gradients alone, before its learning rate."""
        if self._sketches is None or checkpoint != self._checkpoint:
            self._collect()
            sketcher = self._sketcher
            self._checkpoint = checkpoint
            self._sketches = Sketches(
                sketcher.hashes[checkpoint],
                1,
                self._num_steps,
                width=sketcher.width,
                layer_path=sketcher.config.layer_path,
                device=sketcher.device,
                scales=None if sketcher.scales_of is None else sketcher.scales_of(checkpoint),
            )
        return self._sketches

    def _collect(self) -> None:
        if self._sketches is not None and self._checkpoint is not None:
            self._values += self._sketcher.factors[self._checkpoint] * self._sketches.values[0]
        self._sketches = None


def _gradient(piece: GradientPiece, shape: tuple[int, ...], device: torch.device) -> Gradient:
    name = piece.parameter
    match piece:
        case DenseGradient():
            values, size = _numbers(piece.values, name, device).flatten(), math.prod(shape)
            if not 0 <= piece.start <= size - len(values):
                raise GradientError(
                    f"{name} has {size} entries, the piece has {len(values)} from {piece.start} on: more than there are"
                )
            return _whole_rows(values, piece.start, shape)
        case FactoredGradient():
            _check_matrix(name, shape, "factors")
            left = _numbers(piece.output_gradients, name, device)
            right = _numbers(piece.inputs, name, device)
            _check_shapes(name, shape, left, right)
            return OuterProduct(left.unsqueeze(0), right.unsqueeze(0))
        case RowGradient():
            _check_matrix(name, shape, "rows")
            values, rows = _numbers(piece.values, name, device), np.asarray(piece.rows)
            if rows.dtype != np.int64 or values.dim() != 2 or values.shape != (*rows.shape, shape[1]):
                raise GradientError(
                    f"rows of {name} are {rows.dtype} {rows.shape} and values {tuple(values.shape)}, expected int64 "
                    f"[n] and [n, {shape[1]}]"
                )
            if rows.min() < 0 or rows.max() >= shape[0]:
                raise GradientError(f"{name} has {shape[0]} rows, the piece names {rows.min()} to {rows.max()}")
            return TableRows(torch.from_numpy(rows.copy()).to(device).unsqueeze(0), values.unsqueeze(0))


def _check_matrix(name: str, shape: tuple[int, ...], what: str) -> None:
    if len(shape) != 2:
        raise GradientError(f"{name} has shape {list(shape)} and is no matrix: send its entries, not {what}")


def _check_shapes(name: str, shape: tuple[int, ...], left: Tensor, right: Tensor) -> None:
    outputs, inputs = shape
    fits = left.dim() == right.dim() == 2 and len(left) == len(right)
    if not fits or (left.shape[1], right.shape[1]) != (outputs, inputs):
        raise GradientError(
            f"factors of {name} have shapes {list(left.shape)} and {list(right.shape)}, expected [T, {outputs}] "
            f"(output gradients) and [T, {inputs}] (inputs) of one T"
        )


def _numbers(values: NDArray[Any], name: str, device: torch.device) -> Tensor:
    """As float32 on the device: a copy, since arrays off the wire are read-only."""
    if values.dtype.kind != "f" or not values.size:
        raise GradientError(f"a piece of {name} is {values.dtype} of shape {list(values.shape)}, expected floats, "
                            "at least one")  # fmt: skip
    with np.errstate(over="ignore"):  # what overflows is refused in the next line
        tensor = torch.from_numpy(values.astype(np.float32, order="C")).to(device)
    if not bool(tensor.isfinite().all()):
        raise GradientError(f"a piece of {name} has values that are infinite, not a number or beyond float32")
    return tensor


def _whole_rows(values: Tensor, start: int, shape: tuple[int, ...]) -> Dense:
    """The entries with zeros around them up to whole rows, which is what a matrix's hash takes."""
    if len(shape) != 2:
        return Dense(values.unsqueeze(0), start)
    before = start % shape[1]
    after = -(before + len(values)) % shape[1]
    return Dense(functional.pad(values, (before, after)).unsqueeze(0), start - before)


def _some(names: Mapping[str, Any]) -> str:
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (f", ... ({len(listed)})" if len(listed) > SHOWN else "")
