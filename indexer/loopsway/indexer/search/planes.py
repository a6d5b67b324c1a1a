"""Queries in bit planes, and their products with sign codes: xor and popcount.

n rows, M queries, P planes, W width, L words of a row of codes.

A cell of P bits stands for the odd number 2 cell - 2^P + 1 = sum_j 2^j s_j of signs s_j, its planes; and <s_j, c> of
sign codes is W - 2 popcount(s_j xor c). So products are sums of whole numbers, and equal codes have equal ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..compiled import compiled, compiled_sums
from ..sketches.coding import GAUSSIAN_STEP
from .inner_loops import popcount

TOGETHER = 4  # planes that meet a word of codes while it is in a register; P is a multiple of it
EXACT = 24  # planes of a query that is met exactly: float32 holds no more
TILE_BYTES = 16 << 10  # of codes: they stay in the nearest cache while all queries meet them


class CoarsePlanes(NamedTuple):
    """Queries over their peaks, in a few planes.

    Attributes:
        planes: uint8 [M, P, W / 8].
        scale: float32 [M], of cells: what coding takes from a query, the rest, is then orthogonal to the query.
        rests: float64 [M], lengths of the rests.
        lengths: float64 [M], of queries.
        peaks: float32 [M], the largest magnitudes; 1 of zeros.
    """

    planes: np.ndarray
    scale: np.ndarray
    rests: np.ndarray
    lengths: np.ndarray
    peaks: np.ndarray


def coarse_planes(queries: np.ndarray, count: int) -> CoarsePlanes:
    """Codes queries, float32 [M, W], in 4 or 8 planes."""
    (num_queries, width), step = queries.shape, GAUSSIAN_STEP[count] / math.sqrt(queries.shape[1])
    coded = CoarsePlanes(
        planes=np.empty((num_queries, count, width // 8), np.uint8),
        scale=np.empty(num_queries, np.float32),
        rests=np.empty(num_queries),
        lengths=np.empty(num_queries),
        peaks=np.empty(num_queries, np.float32),
    )
    _code_coarsely(np.ascontiguousarray(queries), step, *coded)
    return coded


def exact_planes(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries [M, W] as whole numbers in so many planes that nothing is lost: uint8 [M, EXACT, W / 8].

    And what these numbers are multiples of, float64 [M].
    """
    planes = np.empty((len(queries), EXACT, queries.shape[1] // 8), np.uint8)
    units = np.empty(len(queries))
    _code_exactly(np.ascontiguousarray(queries), planes, units)
    return planes, units


def write_products(
    codes: np.ndarray, planes: np.ndarray, scale: np.ndarray, factors: np.ndarray, out: np.ndarray
) -> None:
    """Writes <cells, codes> scale factors.

    Args:
        codes: of signs, uint8 [n, W / 8].
        planes: uint8 [M, P, W / 8].
        scale: of each query, [M].
        factors: of each row, [n].
        out: [M, n], of the same type as scale and factors.
    """
    at_once = max(2, TILE_BYTES // codes.shape[1])
    _write_products(_words(codes), _words(planes), scale, factors, at_once, out)


def write_own_products(
    codes: np.ndarray, whose: np.ndarray, planes: np.ndarray, units: np.ndarray, out: np.ndarray
) -> None:
    """Writes <query, codes> of each row with a query of its own, float64 [n].

    Args:
        codes: of signs, uint8 [n, W / 8].
        whose: number of each row's query, int64 [n].
        planes: of `exact_planes`.
        units: of `exact_planes`.
        out: [n].
    """
    _write_own_products(_words(codes), whose, _words(planes), units, out)


def sign_sums(codes: np.ndarray) -> np.ndarray:
    """Sums of sign codes, uint8 [n, W / 8]: int64 [n]."""
    out = np.empty(len(codes), np.int64)
    _write_sign_sums(_words(codes), out)
    return out


def _words(packed: np.ndarray) -> np.ndarray:
    """As read-only uint64, or where a row is no whole number of them as they are."""
    words = packed.view(np.uint64 if packed.shape[-1] % 8 == 0 else np.uint8)
    words.flags.writeable = False  # Numba would compile once more
    return words


@compiled
def _peak(values: np.ndarray) -> float:
    """The largest magnitude of some values, float32; 1 of zeros."""
    bits, most = values.view(np.int32), np.zeros(1, np.int32)
    peak, mask = np.int32(0), np.int32(0x7FFFFFFF)
    for place in range(len(bits)):  # as whole numbers magnitudes have the same order
        peak = max(peak, bits[place] & mask)
    most[0] = peak
    return np.float64(most.view(np.float32)[0]) if peak else 1.0


@compiled
def write_planes(cells: np.ndarray, parts: np.ndarray, planes: np.ndarray) -> None:
    """Writes the planes [P, W / 8] of cells int32 [W]; `parts`, uint8 [W], is room to work in.

    Eight bits of eight cells are one word, whose transpose holds a byte of each of eight planes.
    """
    words = parts.view(np.uint64)
    for first in range(0, len(planes), 8):
        for place in range(len(cells)):
            parts[place] = np.uint8(cells[place] >> first)
        for place in range(len(words)):
            word = words[place]
            swapped = (word ^ (word >> np.uint64(7))) & np.uint64(0x00AA00AA00AA00AA)
            word ^= swapped ^ (swapped << np.uint64(7))
            swapped = (word ^ (word >> np.uint64(14))) & np.uint64(0x0000CCCC0000CCCC)
            word ^= swapped ^ (swapped << np.uint64(14))
            swapped = (word ^ (word >> np.uint64(28))) & np.uint64(0x00000000F0F0F0F0)
            words[place] = word ^ swapped ^ (swapped << np.uint64(28))
        for plane in range(first, min(first + 8, len(planes))):
            own, shift = planes[plane], np.uint64(8 * (plane - first))
            for place in range(len(own)):
                own[place] = np.uint8(words[place] >> shift)


@compiled
def _code_exactly(queries: np.ndarray, planes: np.ndarray, units: np.ndarray) -> None:
    width, half = queries.shape[1], 1 << (planes.shape[1] - 1)
    cells, parts = np.empty(width, np.int32), np.empty(width, np.uint8)
    for query in range(len(queries)):
        values = queries[query]
        peak = _peak(values)
        times = (half - 1) / peak
        for place in range(width):
            cells[place] = np.int32(np.floor(values[place] * times + 0.5)) + np.int32(half)
        write_planes(cells, parts, planes[query])
        units[query] = peak / (2 * (half - 1))


@compiled_sums
def _code_coarsely(
    queries: np.ndarray,
    step: float,
    planes: np.ndarray,
    scale: np.ndarray,
    rests: np.ndarray,
    lengths: np.ndarray,
    peaks: np.ndarray,
) -> None:
    """Cells are as wide as `step` times the query is long."""
    width, half = queries.shape[1], 1 << (planes.shape[1] - 1)
    cells, parts = np.empty(width, np.int32), np.empty(width, np.uint8)
    for query in range(len(queries)):
        values = queries[query]
        peaks[query] = peak = _peak(values)
        over = 1 / peak
        square = along = levels = 0.0
        for place in range(width):
            unit = values[place] * over
            square += unit * unit
        times = over / (step * math.sqrt(square)) if square > 0 else 0.0
        for place in range(width):
            cell = np.floor(values[place] * times)
            cell = cell if cell > -half else np.float64(-half)
            cell = cell if cell < half - 1 else np.float64(half - 1)
            cells[place] = np.int32(cell) + np.int32(half)
            level = 2 * cell + 1
            along += values[place] * over * level
            levels += level * level
        scale[query] = square / along if along > 0 else 0.0
        by, lengths[query] = np.float64(scale[query]), math.sqrt(square)
        rests[query] = math.sqrt(max(0.0, square - 2 * by * along + by * by * levels))
        write_planes(cells, parts, planes[query])


@compiled
def _write_products(
    codes: np.ndarray, planes: np.ndarray, scale: np.ndarray, factors: np.ndarray, at_once: int, out: np.ndarray
) -> None:
    num_planes, one = planes.shape[1], np.uint64(1)
    two, three, four = np.uint64(2), np.uint64(3), np.uint64(TOGETHER)
    most = ((1 << num_planes) - 1) * codes.shape[1] * 8 * codes.itemsize
    for start in range(0, len(codes), at_once):
        stop = min(start + at_once, len(codes))
        for query in range(len(planes)):
            for row in range(start, stop, 2):  # two at once read the planes half as often
                other = min(row + 1, stop - 1)
                first, second = codes[row], codes[other]
                here = there = np.uint64(0)
                for plane in range(num_planes - TOGETHER, -1, -TOGETHER):
                    own = planes[query, plane : plane + TOGETHER]
                    a = b = np.uint64(0)
                    for word in range(len(first)):
                        x, y = np.uint64(first[word]), np.uint64(second[word])
                        p, q, r, s = own[0, word], own[1, word], own[2, word], own[3, word]
                        a += popcount(x ^ p) + (popcount(x ^ q) << one)
                        a += (popcount(x ^ r) << two) + (popcount(x ^ s) << three)
                        b += popcount(y ^ p) + (popcount(y ^ q) << one)
                        b += (popcount(y ^ r) << two) + (popcount(y ^ s) << three)
                    here, there = (here << four) + a, (there << four) + b
                out[query, row] = (most - 2 * np.int64(here)) * scale[query] * factors[row]
                out[query, other] = (most - 2 * np.int64(there)) * scale[query] * factors[other]


@compiled
def _sign_sum(words: np.ndarray) -> np.int64:
    """The sum of a row of sign codes."""
    ones = np.uint64(0)
    for place in range(len(words)):
        ones += popcount(np.uint64(words[place]))
    return 2 * np.int64(ones) - len(words) * 8 * words.itemsize


@compiled
def _write_own_products(
    codes: np.ndarray, whose: np.ndarray, planes: np.ndarray, units: np.ndarray, out: np.ndarray
) -> None:
    num_planes, one = planes.shape[1], np.uint64(1)
    two, three, four = np.uint64(2), np.uint64(3), np.uint64(TOGETHER)
    most = ((1 << num_planes) - 1) * codes.shape[1] * 8 * codes.itemsize
    for row in range(len(codes)):
        first, query = codes[row], whose[row]
        here = np.uint64(0)
        for plane in range(num_planes - TOGETHER, -1, -TOGETHER):
            own = planes[query, plane : plane + TOGETHER]
            a = np.uint64(0)
            for word in range(len(first)):
                x = np.uint64(first[word])
                p, q, r, s = own[0, word], own[1, word], own[2, word], own[3, word]
                a += popcount(x ^ p) + (popcount(x ^ q) << one)
                a += (popcount(x ^ r) << two) + (popcount(x ^ s) << three)
            here = (here << four) + a
        # Levels are odd; with the signs' own sum taken off, they are 2 (cell - half).
        out[row] = (most - 2 * np.int64(here) - _sign_sum(first)) * units[query]


@compiled
def _write_sign_sums(codes: np.ndarray, out: np.ndarray) -> None:
    for row in range(len(codes)):
        out[row] = _sign_sum(codes[row])
