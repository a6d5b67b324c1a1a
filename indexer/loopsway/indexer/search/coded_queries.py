"""Queries in the form in which they meet stored codes: estimates of scores, and how far these may be off.

n rows, M queries, W width, L stored values of a row.

Codes are never decoded: queries are coded instead. Sign bits meet a query's bit planes (planes.py), 2 to 8 bits its
int8 form, 16 and 32 bits its float16 and float32 form, or bfloat16 where several queries meet 16 bits; NumKong
multiplies these. A coded query, its *levels*, is scaled so that what coding took from the query is orthogonal to it: an
estimate is exact along the query, as factors make codes exact along their row (coding.py). The rest, after the random
rotation, points nowhere, so that it moves a row's score by |rest| |row| / sqrt(W) as a standard deviation; `DEVIATIONS`
of these, and what float32 loses, are the *slack*.

Without the scale, estimates of rows that are like the query would be too low: these are the ones that a search is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numkong
import numpy as np

from .inner_loops import rescale, round_to_bfloat16
from .planes import coarse_planes, write_products

PLANES, MORE_PLANES = 4, 8  # of a query that meets sign bits: at first, and where that tells too little
DEVIATIONS = 6.0
ROUNDING = 1e-5  # of |query| |row|: what float32 sums of W products lose
# What bfloat16 takes from a row of float16: half a bit in 2^8 of each value, and at most 2^-15 of those below 2^-14,
# which, as what coding took from a query, point nowhere.
BFLOAT16_LOSS = 2.0**-9 + DEVIATIONS * 2.0**-15
# `cdist` multiplies pair by pair: 13 ns for each, and then faster than the packed kernels. It takes one query, or two
# of so many bytes together.
PAIRED_QUERIES, PAIRED_QUERY_BYTES = 2, 4096
TILE_ROWS = 1024  # that are multiplied at once: their products stay in the cache

Products = Callable[[np.ndarray], np.ndarray]  # of codes [n, L] with levels, without the offset: numbers [n, M]


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedQueries:
    """Queries over their peaks, coded.

    Attributes:
        scale: float32 [M], of the products with levels.
        slack: float32 [M]; times the length of a row's codes, what an estimate may be off by.
        peaks: float32 [M], the largest entries; 1 for a query of zeros.
    """

    scale: np.ndarray
    slack: np.ndarray
    peaks: np.ndarray
    _products: np.ndarray | Products  # of sign bits the planes
    _offset: np.ndarray  # float32 [M]

    def estimate(self, codes: np.ndarray, factors: np.ndarray, out: np.ndarray) -> None:
        """Writes <query / peak, codes> factors, of codes [n, L] and their factors float32 [n], to float32 [M, n]."""
        if isinstance(self._products, np.ndarray):
            write_products(codes, self._products, self.scale, factors, out)
            return
        for start in range(0, len(codes), TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            rescale(self._products(codes[tile]), self._offset, self.scale, factors[tile], out[:, tile])


def code_queries(queries: np.ndarray, bits: int, planes: int = PLANES) -> CodedQueries:
    """Codes rotated queries, float32 [M, W], for rows of so many bits; in so many planes, 4 or 8, for sign bits."""
    if bits == 1:
        return _in_planes(queries, planes)
    unit, peaks = by_peaks(queries)
    offset, rounding = np.zeros(len(unit), np.float32), ROUNDING
    if bits <= 8:
        products, levels, offset = _as_int8(unit, bits)
    elif bits == 16 and not _is_paired(unit.astype(np.float16)):
        products, levels = _as_bfloat16(unit)
        rounding += BFLOAT16_LOSS
    else:
        products, levels = _as_floats(unit, bits)
    square, along = (np.einsum("mw,mw->m", unit, each, dtype=np.float64) for each in (unit, levels))
    scale = np.divide(square, along, out=np.zeros_like(square), where=along > 0).astype(np.float32)
    slack = slack_of(unit, scale[:, None] * levels, rounding)
    return CodedQueries(scale=scale, slack=slack, peaks=peaks, _products=products, _offset=offset)


def by_peaks(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries [M, W] over their peaks, and these, float32 [M]; the peak of zeros is 1."""
    peaks = np.abs(queries).max(1)
    peaks[peaks == 0] = 1
    return queries / peaks[:, None], peaks.astype(np.float32)


def slack_of(unit: np.ndarray, coded: np.ndarray, rounding: float) -> np.ndarray:
    """Times the length of a row, what its product with a coded query may be off by, float32 [M].

    Args:
        unit: queries over their peaks, [M, W].
        coded: what stands for them, [M, W].
        rounding: of |query| |row|: what the sums lose.
    """
    return _slack(np.linalg.norm(unit - coded, axis=1), np.linalg.norm(unit, axis=1), unit.shape[1], rounding)


def _slack(rests: np.ndarray, lengths: np.ndarray, width: int, rounding: float) -> np.ndarray:
    """Of how long queries and the rests of them are, [M]."""
    return (DEVIATIONS * rests / math.sqrt(width) + rounding * lengths).astype(np.float32)


def _in_planes(queries: np.ndarray, count: int) -> CodedQueries:
    planes, scale, rests, lengths, peaks = coarse_planes(queries, count)
    slack = _slack(rests, lengths, queries.shape[1], ROUNDING)
    offset = np.zeros(len(queries), np.float32)
    return CodedQueries(scale=scale, slack=slack, peaks=peaks, _products=planes, _offset=offset)


def _as_int8(unit: np.ndarray, bits: int) -> tuple[Products, np.ndarray, np.ndarray]:
    """A stored cell c of b bits stands for 2 c - 2^b + 1, which is 2 (c - 128) + 1 for 8; products leave out the 2."""
    each, top = 8 // bits, (1 << bits) - 1
    levels = np.rint(unit * 127).astype(np.int8)
    dots = [_dots(np.ascontiguousarray(levels[:, place::each]), "int8") for place in range(each)]
    offset = levels.sum(1, dtype=np.float32) * np.float32(0.5 if bits == 8 else -top / 2)

    def signed(codes: np.ndarray, place: int) -> np.ndarray:
        cells = codes ^ np.uint8(128) if bits == 8 else (codes >> (place * bits)) & np.uint8(top)
        return cells.view(np.int8)

    def products(codes: np.ndarray) -> np.ndarray:
        sums = dots[0](signed(codes, 0))
        for place in range(1, each):
            sums = sums + dots[place](signed(codes, place))
        return sums

    return products, levels / np.float32(2), offset


def _as_floats(unit: np.ndarray, bits: int) -> tuple[Products, np.ndarray]:
    kind = "float16" if bits == 16 else "float32"
    levels = unit.astype(kind)
    return _dots(levels, kind), levels


def _as_bfloat16(unit: np.ndarray) -> tuple[Products, np.ndarray]:
    """Of float16 rows: what numpy has no type for is uint16, with the same bits."""
    levels = np.empty(unit.shape, np.uint16)
    round_to_bfloat16(unit.astype(np.float16).view(np.uint16), levels)
    packed = numkong.dots_pack(_bfloat16(levels))

    def products(values: np.ndarray) -> np.ndarray:
        rounded = np.empty(values.shape, np.uint16)
        round_to_bfloat16(values.view(np.uint16), rounded)
        return np.asarray(numkong.dots_packed(_bfloat16(rounded), packed))

    return products, (levels.astype(np.uint32) << 16).view(np.float32)


def _bfloat16(bits: np.ndarray) -> numkong.Tensor:
    return numkong.from_pointer(bits.ctypes.data, bits.shape, "bf16", owner=bits)


def _is_paired(levels: np.ndarray) -> bool:
    return len(levels) <= PAIRED_QUERIES and (len(levels) - 1) * levels.nbytes <= PAIRED_QUERY_BYTES


def _dots(levels: np.ndarray, kind: Literal["int8", "float16", "float32"]) -> Products:
    """Of values [n, W] of this type."""
    if _is_paired(levels):
        # Of int32, float32 and float64, the products' own type, `cdist` would pack.
        other = np.float64 if kind == "float16" else np.float32

        def paired(values: np.ndarray) -> np.ndarray:
            products = np.empty((len(values), len(levels)), other)
            numkong.cdist(values, levels, "dot", out=products)
            return products

        return paired
    packed = numkong.dots_pack(levels, dtype=kind)
    return lambda values: np.asarray(numkong.dots_packed(values, packed))
