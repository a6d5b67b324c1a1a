"""Queries in the form in which they meet stored codes: estimates of scores, and how far these may be off.

n rows, M queries, W width, L stored values of a row, P bit planes, C = M P columns.

Codes are never decoded: queries are coded instead. Sign bits meet a query's bit planes (xor and popcount), 2 to 8 bits
its int8 form, 16 and 32 bits its float16 and float32 form; NumKong multiplies. A coded query, its *levels*, is scaled
so that what coding took from the query is orthogonal to it: an estimate is exact along the query, as factors make codes
exact along their row (coding.py). The rest, after the random rotation, points nowhere, so that it moves a row's score
by |rest| |row| / sqrt(W) as a standard deviation; `DEVIATIONS` of these, and what float32 loses, are the *slack*.

Without the scale, estimates of rows that are like the query would be too low: these are the ones that a search is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numkong
import numpy as np

from ..sketches.coding import GAUSSIAN_STEP

PLANES, MORE_PLANES = 4, 8  # of a query that meets sign bits: at first, and where that tells too little
DEVIATIONS = 6.0
ROUNDING = 1e-5  # of |query| |row|: what float32 sums of W products lose
# `cdist` multiplies pair by pair: 13 ns for each, and then faster than the packed kernels. Sign bits are paired from
# rows of so many bytes on, and up to so many columns; numbers for one query, or for two of so many bytes together.
PAIRED_ROW_BYTES, PAIRED_COLUMNS = 512, 6
PAIRED_QUERIES, PAIRED_QUERY_BYTES = 2, 4096
TILE_ROWS = 1024  # that a packed kernel takes at once: their counts stay in the cache

Products = Callable[[np.ndarray, np.ndarray], None]  # of codes [n, L]; written to float32 [M, n]


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedQueries:
    """Queries over their peaks, coded.

    Attributes:
        products: writes <levels, codes>.
        scale: float32 [M], of the levels.
        slack: float32 [M]; times the length of a row's codes, what an estimate may be off by.
        peaks: float32 [M], the largest entries; 1 for a query of zeros.
    """

    products: Products
    scale: np.ndarray
    slack: np.ndarray
    peaks: np.ndarray

    def estimate(self, codes: np.ndarray, out: np.ndarray) -> None:
        """Writes <query / peak, codes>, without the codes' factors, to float32 [M, n]."""
        self.products(codes, out)
        out *= self.scale[:, None]


def code_queries(queries: np.ndarray, bits: int, planes: int = PLANES) -> CodedQueries:
    """Codes rotated queries, float32 [M, W], for rows of so many bits; in so many planes, 4 or 8, for sign bits."""
    unit, peaks = by_peaks(queries)
    if bits == 1:
        products, levels = _as_planes(unit, planes)
    else:
        products, levels = _as_int8(unit, bits) if bits <= 8 else _as_floats(unit, bits)
    square, along = (np.einsum("mw,mw->m", unit, each, dtype=np.float64) for each in (unit, levels))
    scale = np.divide(square, along, out=np.zeros_like(square), where=along > 0).astype(np.float32)
    slack = slack_of(unit, scale[:, None] * levels, ROUNDING)
    return CodedQueries(products=products, scale=scale, slack=slack, peaks=peaks)


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
    rest, length = np.linalg.norm(unit - coded, axis=1), np.linalg.norm(unit, axis=1)
    return (DEVIATIONS * rest / math.sqrt(unit.shape[1]) + rounding * length).astype(np.float32)


def bit_planes(cells: np.ndarray, count: int) -> np.ndarray:
    """Packed bits, uint8 [count, M, W / 8], of cells [M, W], the lowest first.

    A cell stands for 2 cell - 2^count + 1 = sum_j 2^j s_j of signs s_j, and <s_j, c> of sign codes is
    W - 2 popcount(s_j xor c).
    """
    masks = (1 << np.arange(8, dtype=np.uint8))[:, None, None]  # packbits takes any number but 0 for a one
    parts = [(cells >> place).astype(np.uint8) & masks[: count - place] for place in range(0, count, 8)]
    return np.packbits(np.concatenate(parts), axis=2, bitorder="little")


def query_by_query(planes: np.ndarray) -> np.ndarray:
    """Columns [M P, L] of planes [P, M, L]: those of a query are together."""
    return np.ascontiguousarray(planes.swapaxes(0, 1)).reshape(-1, planes.shape[2])


def _as_planes(unit: np.ndarray, count: int) -> tuple[Products, np.ndarray]:
    width, top, half = unit.shape[1], (1 << count) - 1, 1 << (count - 1)
    steps = np.linalg.norm(unit, axis=1, keepdims=True) * np.float32(GAUSSIAN_STEP[count] / math.sqrt(width))
    steps[steps == 0] = 1
    cells = (np.clip(np.floor(unit / steps), -half, half - 1) + half).astype(np.uint8)
    planes, levels = bit_planes(cells, count), 2 * cells.astype(np.float32) - top
    paired = width >= 8 * PAIRED_ROW_BYTES and len(unit) * count <= PAIRED_COLUMNS
    differing = _paired_differences(planes) if paired else _packed_differences(planes)

    def products(codes: np.ndarray, out: np.ndarray) -> None:
        differing(codes, out)
        out *= -2
        out += top * width

    return products, levels


def _paired_differences(planes: np.ndarray) -> Products:
    """Writes sum_j 2^j popcount(plane j xor codes); counts are whole numbers below 2^24, and so exact."""
    columns, weights = query_by_query(planes), 2 ** np.arange(len(planes), dtype=np.float32)

    def differing(codes: np.ndarray, out: np.ndarray) -> None:
        counts = np.empty((len(codes), len(columns)), np.float32)  # of uint32, its own type, `cdist` would pack
        numkong.cdist(codes, columns, "hamming", dtype="uint1", out=counts)
        for query, own in enumerate(out):
            np.dot(counts[:, query * len(weights) : (query + 1) * len(weights)], weights, out=own)

    return differing


def _packed_differences(planes: np.ndarray) -> Products:
    """As `_paired_differences`, plane by plane: sums of M columns at once."""
    packed, count = numkong.hammings_pack(planes.reshape(-1, planes.shape[2])), planes.shape[1]

    def differing(codes: np.ndarray, out: np.ndarray) -> None:
        for start in range(0, len(codes), TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            counts = np.asarray(numkong.hammings_packed(codes[tile], packed)).view(np.int32)  # [n, C]
            total = counts[:, -count:]
            for place in reversed(range(len(planes) - 1)):
                total = total + total
                total += counts[:, place * count : (place + 1) * count]
            out[:, tile] = total.T

    return differing


def _as_int8(unit: np.ndarray, bits: int) -> tuple[Products, np.ndarray]:
    """A stored cell c of b bits stands for 2 c - 2^b + 1, which is 2 (c - 128) + 1 for 8."""
    each, top = 8 // bits, (1 << bits) - 1
    levels = np.rint(unit * 127).astype(np.int8)
    dots = [_dots(np.ascontiguousarray(levels[:, place::each]), "int8") for place in range(each)]
    constant = levels.sum(1, dtype=np.float32)[:, None] * (1 if bits == 8 else -top)

    def signed(codes: np.ndarray, place: int) -> np.ndarray:
        cells = codes ^ np.uint8(128) if bits == 8 else (codes >> (place * bits)) & np.uint8(top)
        return cells.view(np.int8)

    def products(codes: np.ndarray, out: np.ndarray) -> None:
        for start in range(0, len(codes), TILE_ROWS):
            tile, own = codes[start : start + TILE_ROWS], out[:, start : start + TILE_ROWS]
            part = np.empty(own.shape, np.float32)
            own[...] = constant
            for place, dot in enumerate(dots):
                dot(signed(tile, place), part)
                part *= 2
                own += part

    return products, levels


def _as_floats(unit: np.ndarray, bits: int) -> tuple[Products, np.ndarray]:
    kind = "float16" if bits == 16 else "float32"
    levels = unit.astype(kind)
    return _dots(levels, kind), levels


def _dots(levels: np.ndarray, kind: Literal["int8", "float16", "float32"]) -> Products:
    """Writes <levels, values> of values [n, W] of this type."""
    count = len(levels)
    if count <= PAIRED_QUERIES and (count - 1) * levels.nbytes <= PAIRED_QUERY_BYTES:
        other = (
            np.float64 if kind == "float16" else np.float32
        )  # of int32, float32, float64, its own, `cdist` would pack

        def paired(values: np.ndarray, out: np.ndarray) -> None:
            products = np.empty((len(values), count), other)
            numkong.cdist(values, levels, "dot", out=products)
            out[...] = products.T

        return paired
    packed = numkong.dots_pack(levels, dtype=kind)

    def products(values: np.ndarray, out: np.ndarray) -> None:
        for start in range(0, len(values), TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            out[:, tile] = np.asarray(numkong.dots_packed(values[tile], packed)).T

    return products
