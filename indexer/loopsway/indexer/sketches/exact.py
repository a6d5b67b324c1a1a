"""Keeps per-example gradients as they are: the exact counterpart of a sketch, for tests on small models.

B examples, T tokens, S steps, P entries of all parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..gradients.forms import Gradient, multiplied_out
from .hashes import matrix_shape


class ExactGradients:
    """The gradients of a batch, all parameters after one another.

    Args:
        shapes: of the parameters, by name; their order is the order in `values`.
        batch: number of examples B.
        num_steps: S.
        device: of the result.
        scales: factors of each gradient's entries, float32 of the parameter's shape, by name; what is not named is 1.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        batch: int,
        num_steps: int,
        *,
        device: torch.device,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._shapes = {name: matrix_shape(shape) for name, shape in shapes.items()}
        self._scales = dict(scales or {})
        self._starts, size = {}, 0
        for name, (rows, columns) in self._shapes.items():
            self._starts[name] = size
            size += rows * columns
        self.values = torch.zeros(batch, num_steps, size, device=device)  # [B, S, P]

    def add(self, parameter: str, step: int, gradient: Gradient) -> None:
        rows, columns = self._shapes[parameter]
        begin = self._starts[parameter]
        out = self.values[:, step, begin : begin + rows * columns]
        entries = multiplied_out(gradient, (rows, columns))
        out += entries * self._scales[parameter].flatten() if parameter in self._scales else entries
