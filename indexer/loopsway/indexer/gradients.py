"""The forms that a parameter's per-example gradient comes in: the cheapest that is exact.

B examples, T tokens or other terms of the sum, I inputs, O outputs, P entries, V rows of a table, D features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class OuterProduct:
    """Gradient sum_t left[t] right[t]^T, [B, O, I], not multiplied out; of a stack of matrices, of the `index`-th."""

    left: Tensor  # [B, T, O] gradients at the output
    right: Tensor  # [B, T, I] inputs
    index: int | None = None


@dataclass(frozen=True, eq=False)
class TableRows:
    """Gradient of a [V, D] table that is zero but at the rows that were looked up; a row may come more than once."""

    rows: Tensor  # [B, T] int64
    values: Tensor  # [B, T, D]


@dataclass(frozen=True, eq=False)
class Dense:
    """Entries of the gradient in the parameter's own order: all of them, or those from `start` on.

    Of a matrix, whole rows.
    """

    values: Tensor  # [B, P]
    start: int = 0


Gradient = OuterProduct | TableRows | Dense


def multiplied_out(gradient: Gradient, shape: Sequence[int]) -> Tensor:
    """All entries of the gradient of a tensor of this shape, [B, P]."""
    match gradient:
        case OuterProduct(left, right, None):
            return torch.bmm(left.transpose(1, 2), right).flatten(1)
        case OuterProduct(left, right, int(index)):
            size = left.shape[2] * right.shape[2]
            return _padded(torch.bmm(left.transpose(1, 2), right).flatten(1), index * size, math.prod(shape))
        case TableRows(rows, values):
            out = values.new_zeros(len(values), *shape[:1], values.shape[2])
            index = rows.unsqueeze(-1).expand_as(values)
            return out.scatter_add_(1, index, values).flatten(1)
        case Dense(values, start):
            return _padded(values, start, math.prod(shape))
    raise AssertionError(gradient)


def in_full(values: Tensor) -> Tensor:
    """In single precision; complex values stay complex."""
    return values if values.is_complex() else values.float()


def _padded(values: Tensor, start: int, size: int) -> Tensor:
    """Zeros around the given entries, [B, size]."""
    if values.shape[1] == size:
        return values
    out = values.new_zeros(len(values), size)
    out[:, start : start + values.shape[1]] = values
    return out
