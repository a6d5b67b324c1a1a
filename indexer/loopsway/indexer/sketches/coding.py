"""Rotates finished sketches and codes them to a few bits a coordinate, with one factor a row; and back.

N rows, W width, b bits.

A sketch x is rotated (random signs, then a Walsh-Hadamard transform, twice), so that its coordinates are near Gaussian
whatever they were, and coded to c. The factor |x|^2 / <c, x> makes factor * <c, q> an estimate of <x, q> that is exact
along x itself and unbiased over rotations; with 1 bit, c = sign(x), this is RaBitQ's estimator (Gao and Long 2024,
section 3). A query is rotated and stays float32. Rotating keeps inner products, so rotated and stored sketches are
compared as if neither had been.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import ROTATIONS
from .rotation import rotate

# Distance between the levels of a b-bit uniform quantizer of a unit Gaussian with the least square error (Max 1960).
GAUSSIAN_STEP = {1: 1.596, 2: 0.9957, 4: 0.3352, 8: 0.0308}
TILE_BYTES = 4 << 20  # of sketches that are rotated and coded at once: they stay in the cache


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """Coded rows, as the store holds them.

    Attributes:
        codes: [N, W * b / 8] uint8, or [N, W] float16 or float32 for 16 and 32 bits.
        factors: [N] float32; 0 for a zero row.
        norms: [N] float32, of the sketch before coding.
    """

    codes: np.ndarray
    factors: np.ndarray
    norms: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Codes]) -> Codes:
        return cls(
            codes=np.concatenate([part.codes for part in parts]),
            factors=np.concatenate([part.factors for part in parts]),
            norms=np.concatenate([part.norms for part in parts]),
        )


def code_examples(sketches: Tensor, *, seed: int, bits: int, rotations: int = ROTATIONS) -> tuple[Codes, Codes]:
    """Rotates and codes the finished sketches of examples, [B, S, W].

    Returns:
        Codes of each step, example after example, [B * S] rows; and of the sum over steps, [B] rows.

    Raises:
        ValueError: as `encode`.
    """
    tile = max(1, TILE_BYTES // (4 * sketches[0].numel()))
    steps, totals = [], []
    for part in sketches.split(tile):
        rotated = rotate(part, seed, rotations)
        steps.append(encode(rotated.flatten(0, 1), bits))
        totals.append(encode(rotated.sum(1), bits))
    return Codes.joined(steps), Codes.joined(totals)


def encode(rotated: Tensor, bits: int) -> Codes:
    """Codes rotated sketches [N, W].

    Raises:
        ValueError: a value is not finite, or so large that its square overflows float32.
    """
    peaks = rotated.abs().amax(1, keepdim=True)  # [N, 1]; dividing by them first keeps tiny and huge rows exact
    unit = rotated / peaks.clamp_min(torch.finfo(torch.float32).tiny)
    lengths = torch.linalg.vector_norm(unit, dim=1, keepdim=True)  # from 1 to sqrt(W); 0 for a zero row
    norms = (peaks * lengths).squeeze(1)
    if not norms.isfinite().all():
        bad = (~norms.isfinite()).nonzero().flatten().tolist()
        raise ValueError(f"sketches of rows {bad[:8]} are not finite, or too large for float32")
    unit /= lengths.clamp_min(1)
    if bits >= 16:
        codes = values = unit.to(torch.float16 if bits == 16 else torch.float32, copy=True)
        along = unit.mul_(values).sum(1)  # [N] <c, x> / |x|
    elif bits == 1:
        codes = _pack((unit >= 0).to(torch.uint8), bits)
        along = unit.abs_().sum(1)
    else:
        levels = 1 << bits
        values = (unit * (math.sqrt(rotated.shape[1]) / GAUSSIAN_STEP[bits])).floor_()
        values.add_(levels // 2).clamp_(0, levels - 1)
        codes = _pack(values.to(torch.uint8), bits)
        along = unit.mul_(values.mul_(2).sub_(levels - 1)).sum(1)
    factors = torch.where(norms > 0, norms / along, 0)
    return Codes(codes=codes.cpu().numpy(), factors=factors.cpu().numpy(), norms=norms.cpu().numpy())


def decode(codes: np.ndarray, factors: np.ndarray, bits: int) -> np.ndarray:
    """The estimates' row vectors, float32 [N, W]: factor * c."""
    if bits >= 16:
        return codes.astype(np.float32) * factors[:, None]
    cells = _unpack(codes, bits)
    values = cells.astype(np.float32)
    values *= 2
    values -= (1 << bits) - 1
    values *= factors[:, None]
    return values


def row_bytes(width: int, bits: int) -> int:
    """Bytes of one row's codes, without its factor and norm."""
    return width * bits // 8


def code_shape(width: int, bits: int) -> tuple[int, np.dtype]:
    """Length and type of one row's codes."""
    if bits >= 16:
        return width, np.dtype(np.float16 if bits == 16 else np.float32)
    return row_bytes(width, bits), np.dtype(np.uint8)


def variance_factor(bits: int) -> float:
    """How much coding with these bits widens the variance of an estimate, against the float32 sketch."""
    return math.pi / 2 if bits == 1 else _uniform_variance_factor(bits)


def standard_errors(influences: Any, norms: Any, query_norms: Any, *, width: int, bits: int) -> np.ndarray:
    """Of estimates <x, q> of coded sketches x, from the norms of both; arrays that broadcast, float32.

    Sketching has variance (|x|^2 |q|^2 + <x, q>^2) / W (hashes.py), and coding adds its factor's excess over 1 times
    (|x|^2 |q|^2 - <x, q>^2) / W: an estimate is exact along x itself.
    """
    squares, along = (
        np.square(np.multiply(norms, query_norms, dtype=np.float64)),
        np.square(influences, dtype=np.float64),
    )
    across = np.maximum(squares - along, 0)
    return np.sqrt((squares + along + (variance_factor(bits) - 1) * across) / width).astype(np.float32)


@lru_cache
def _uniform_variance_factor(bits: int) -> float:
    """1 / correlation^2 of a unit Gaussian with its code: the noise orthogonal to the row adds to the variance."""
    if bits >= 16:
        return 1.0
    x = np.linspace(-6, 6, 20001)
    weight = np.exp(-x * x / 2)
    levels = 1 << bits
    code = np.clip(np.floor(x / GAUSSIAN_STEP[bits]) + levels // 2, 0, levels - 1) * 2 - (levels - 1)
    along = np.sum(weight * x * code) / np.sqrt(np.sum(weight * x * x) * np.sum(weight * code * code))
    return float(1 / along**2)


def _pack(cells: Tensor, bits: int) -> Tensor:
    """Packs b-bit cells [N, W] into bytes [N, W * b / 8], the first cell in the lowest bits."""
    if bits == 8:
        return cells
    each = 8 // bits
    packed = cells[:, ::each].clone()
    for place in range(1, each):
        packed |= cells[:, place::each] << (place * bits)
    return packed


def _unpack(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes
    if bits == 1:
        return np.unpackbits(codes, axis=1, bitorder="little")
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((codes[:, :, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(codes), 8 // bits * codes.shape[1])
