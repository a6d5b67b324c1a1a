"""The forms that a parameter's per-example gradient comes in: the cheapest that is exact.

B examples, T tokens or other terms of the sum, I inputs, O outputs, P entries, V rows of a table, D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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


def placed(gradient: Gradient, num_dimensions: int) -> Iterator[Gradient]:
    """The same gradient in forms that a sink takes: of a parameter that is no matrix, entries.

    Args:
        gradient: of a parameter.
        num_dimensions: of the parameter's shape.
    """
    match gradient:
        case OuterProduct(left, right, int(index)):
            entries = torch.bmm(left.transpose(1, 2), right).flatten(1)
            yield Dense(entries, index * entries.shape[1])
        case TableRows(rows, values) if num_dimensions != 2:
            for row in rows.unique().tolist():
                entries = (values * (rows == row).unsqueeze(-1)).sum(1)
                yield Dense(entries, row * entries.shape[1])
        case _:
            yield gradient


def scaled(gradient: Gradient, scale: Tensor) -> Gradient:
    """Each example's gradient times its factor [B]."""
    match gradient:
        case OuterProduct(left, _, _):
            return replace(gradient, left=left * scale[:, None, None])
        case TableRows(_, values):
            return replace(gradient, values=values * scale[:, None, None])
        case Dense(values, _):
            return replace(gradient, values=values * scale[:, None])


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
