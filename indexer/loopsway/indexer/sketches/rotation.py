"""Random rotations of sketches, and back: random signs, then a Walsh-Hadamard transform, so many times over.

W width, a power of two. Rotating keeps inner products. On a processor the transform is a compiled loop: W log W
additions for each row, by itself within the nearest cache, so that what it becomes does not depend on what it is
rotated with. On other devices it is a product with matrices, W L multiplications for each factor L of W.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..compiled import compiled
from ..config import ROTATIONS
from .hashes import rotation_signs

LARGEST_FACTOR = 128  # of the Hadamard matrix that is multiplied at once
_LANES = 16  # values whose first differences are taken in registers


def rotate(sketches: Tensor, seed: int, rotations: int = ROTATIONS) -> Tensor:
    """Random rotations of the last dimension, W a power of two; inner products stay."""
    rotated = sketches.float()
    if rotated.device.type == "cpu":
        rows = rotated.contiguous().view(-1, rotated.shape[-1])
        out = torch.empty_like(rows)
        rotate_rows(rows.numpy(), out.numpy(), seed, rotations)
        return out.view(rotated.shape)
    for rotation in range(rotations):
        rotated = _transformed(rotated * _signs(seed, sketches.shape[-1], rotation, sketches.device))
    return rotated


def rotate_rows(rows: np.ndarray, out: np.ndarray, seed: int, rotations: int) -> None:
    """Writes the rotations of rows, float32 [n, W], to others, [n, W]."""
    _rotate(rows, _stacked_signs(seed, rows.shape[-1], rotations), out)


def rotate_back(rotated: Tensor, seed: int, rotations: int = ROTATIONS) -> Tensor:
    """The inverse of `rotate`."""
    sketches = rotated.to(torch.float32, copy=True)
    for rotation in reversed(range(rotations)):
        sketches = _transformed(sketches).mul_(_signs(seed, rotated.shape[-1], rotation, rotated.device))
    return sketches


def _transformed(values: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of the last dimension, without its scale, perhaps in place; it is symmetric."""
    return in_loops(values) if values.device.type == "cpu" else by_matrices(values)


def in_loops(values: Tensor) -> Tensor:
    """The transform on a processor, in place where they lie one after another."""
    values = values.contiguous()
    _transform(values.view(-1, values.shape[-1]).numpy())
    return values


def by_matrices(values: Tensor) -> Tensor:
    """The transform on any device: H_W is a Kronecker product; one factor at a time multiplies its own dimension."""
    width = values.shape[-1]
    inner = min(LARGEST_FACTOR, width)
    out = values.reshape(-1, inner) @ _hadamard(inner, values.device)
    stride = inner
    while stride < width:
        size = min(LARGEST_FACTOR, width // stride)
        out = _hadamard(size, out.device) @ out.reshape(-1, size, stride)
        stride *= size
    return out.reshape(values.shape)


@compiled
def _transform_row(row: np.ndarray) -> None:
    stride = 1
    if len(row) >= _LANES:
        for start in range(0, len(row), _LANES):
            few, stride = row[start : start + _LANES], 1
            while stride < _LANES:
                for first in range(0, _LANES, 2 * stride):
                    for place in range(first, first + stride):
                        a, b = few[place], few[place + stride]
                        few[place], few[place + stride] = a + b, a - b
                stride *= 2
    while stride < len(row):
        for start in range(0, len(row), 2 * stride):
            low, high = row[start : start + stride], row[start + stride : start + 2 * stride]
            for place in range(stride):
                a, b = low[place], high[place]
                low[place], high[place] = a + b, a - b
        stride *= 2


@compiled
def _transform(rows: np.ndarray) -> None:
    """Transforms each row, float32 [n, W], in its place."""
    for number in range(len(rows)):
        _transform_row(rows[number])


@compiled
def _rotate(rows: np.ndarray, signs: np.ndarray, out: np.ndarray) -> None:
    """Writes each row, float32 [n, W], times signs [R, W] and transformed R times."""
    for number in range(len(rows)):
        row, rotated, first = rows[number], out[number], signs[0]
        for place in range(len(row)):
            rotated[place] = row[place] * first[place]
        _transform_row(rotated)
        for rotation in range(1, len(signs)):
            own = signs[rotation]
            for place in range(len(rotated)):
                rotated[place] *= own[place]
            _transform_row(rotated)


@lru_cache
def _signs(seed: int, width: int, rotation: int, device: torch.device) -> Tensor:
    """A rotation's signs over sqrt(W), which makes the transform orthonormal."""
    return torch.from_numpy(rotation_signs(seed, width, rotation)).to(device) / math.sqrt(width)


@lru_cache
def _stacked_signs(seed: int, width: int, rotations: int) -> np.ndarray:
    return np.stack([_signs(seed, width, rotation, torch.device("cpu")).numpy() for rotation in range(rotations)])


@lru_cache
def _hadamard(size: int, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(device)
