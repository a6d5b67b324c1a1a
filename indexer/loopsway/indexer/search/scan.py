"""Scans the codes of one slot: the rows that can be among the best of either sign, for many queries in one pass.

N rows, n rows of a block, M queries, W width, L stored values of a row.

A row is read once and never decoded: queries are coded instead. Sign bits meet a query's eight bit planes (xor and
popcount), 2 to 8 bits its int8 form, 16 and 32 bits its float16 and float32 form; NumKong multiplies. What coding takes
from a query is known, and after the random rotation of coding.py it points nowhere, so that it moves a row's score by
|rest| |row| / sqrt(W) as a standard deviation. Each score is widened by `DEVIATIONS` of these: a row that is left out
has a bound below the limit that the scan gives, and whoever scores the chosen rows exactly can tell whether one of
those left out could have been better.

While a scan runs, queries are divided by their largest entry, their peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numkong
import numpy as np
import torch

PLANES = 8  # of a query that meets sign bits
DEVIATIONS = 6.0
ROUNDING = 1e-5  # of |query| |row|: what float32 sums of W products lose
WAITING = 1 << 20  # bounds of either sign, before the best of them are taken
SPARSE = 0.25  # with a smaller share of kept rows, a block's are copied out before they are multiplied

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedQueries:
    """Queries in the form in which they meet codes.

    Attributes:
        products: gives <coded query, codes>, float32 [n, M], of codes [n, L]; without factors and peaks.
        slack: float32 [M]; times the length of a row's codes, what a product may be wrong by.
        peaks: float32 [M].
    """

    products: Callable[[np.ndarray], np.ndarray]
    slack: np.ndarray
    peaks: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """What a scan leaves over.

    Attributes:
        rows: int64 [M, c], those of the largest bounds; fewer than asked for only if there are no more.
        limits: float32 [M], no row that is left out scores more; -inf if none is.
    """

    rows: np.ndarray
    limits: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The rows to scan.

    Attributes:
        blocks: their numbers, block by block.
        codes: reads a block's codes [n, L].
        factors: float32 [N], of the codes.
        longest: length of the longest row of codes, without its factor.
        kept: bool [N], those that may be found; None: all.
    """

    blocks: Sequence[range]
    codes: Callable[[int], np.ndarray]
    factors: np.ndarray
    longest: float
    kept: np.ndarray | None = None

    def any_kept(self, own: range) -> bool:
        return self.kept is None or bool(self.kept[own.start : own.stop].any())


def code_queries(queries: np.ndarray, bits: int) -> CodedQueries:
    """Codes rotated queries, float32 [M, W], for rows of so many bits."""
    unit, peaks = by_peaks(queries)
    products, coded = _CODERS[bits](unit, bits)
    return CodedQueries(products=products, slack=slack_of(unit, coded, ROUNDING), peaks=peaks)


def by_peaks(queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Queries [M, W] over their peaks, and these, float32 [M]; the peak of zeros is 1."""
    peaks = np.abs(queries).max(1)
    peaks[peaks == 0] = 1
    return queries / peaks[:, None], peaks.astype(np.float32)


def slack_of(unit: np.ndarray, coded: np.ndarray, rounding: float) -> np.ndarray:
    """Times the length of a row, what its product with a coded query may be wrong by, float32 [M].

    Args:
        unit: queries over their peaks, [M, W].
        coded: what stands for them, [M, W].
        rounding: of |query| |row|: what the sums lose.
    """
    rest, length = np.linalg.norm(unit - coded, axis=1), np.linalg.norm(unit, axis=1)
    return (DEVIATIONS * rest / math.sqrt(unit.shape[1]) + rounding * length).astype(np.float32)


def scan(queries: CodedQueries, rows: Rows, count: int) -> tuple[Candidates, Candidates]:
    """The rows of largest, and those of smallest, inner product with each query, `count` of each or all there are.

    Returns:
        Candidates of each sign; the second's limits are of the negated scores. As many threads read as torch has.
    """
    shares = np.array_split(np.arange(len(rows.blocks)), min(torch.get_num_threads(), len(rows.blocks)))
    best = in_threads(lambda share: _scan_blocks(queries, rows, share.tolist(), count + 1), shares)
    signs = (_joined([each[sign] for each in best], count + 1) for sign in range(2))
    largest, smallest = (best_of(*bounds, queries.peaks, count) for bounds in signs)
    return largest, smallest


def in_threads(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """What a function that waits for no other thread gives of each item, in as many threads as torch has."""
    return list(_threads(torch.get_num_threads()).map(function, items))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "loopsway-scan")


_Bounds = tuple[np.ndarray, np.ndarray]  # float32 [M, n], and whose they are, int64 [M, n]


def _scan_blocks(queries: CodedQueries, rows: Rows, blocks: Sequence[int], count: int) -> tuple[_Bounds, _Bounds]:
    """The largest bounds of each sign in these blocks."""
    none: _Bounds = np.empty((len(queries.peaks), 0), np.float32), np.empty((len(queries.peaks), 0), np.int64)
    found, waiting, size = [(none, none)], [], 0  # waiting: rows and their products
    for block in blocks:
        own = np.arange(rows.blocks[block].start, rows.blocks[block].stop)
        kept = slice(None) if rows.kept is None or rows.kept[own].mean() >= SPARSE else rows.kept[own]
        own = own[kept]
        if len(own):  # else nothing of the block is read
            waiting.append((own, queries.products(rows.codes(block)[kept])))
            size += waiting[-1][1].size
        if waiting and (block == blocks[-1] or size > WAITING):
            found.append(_bounds(queries, rows, waiting, count))
            waiting, size = [], 0
    largest, smallest = (_joined([each[sign] for each in found], count) for sign in range(2))
    return largest, smallest


def _bounds(
    queries: CodedQueries, rows: Rows, parts: Sequence[tuple[np.ndarray, np.ndarray]], count: int
) -> tuple[_Bounds, _Bounds]:
    own = np.concatenate([each for each, _ in parts])
    products = np.ascontiguousarray(np.concatenate([each for _, each in parts]).T)  # [M, n]
    factors, slack = rows.factors[own], queries.slack[:, None] * np.float32(rows.longest)
    out = None if rows.kept is None else ~rows.kept[own]
    upper = products + slack
    lower = np.subtract(slack, products, out=products)
    for values in (upper, lower):
        values *= factors
        if out is not None:
            values[:, out] = -np.inf
    whose = np.broadcast_to(own, products.shape)
    return _largest(upper, whose, count), _largest(lower, whose, count)


def _joined(parts: Sequence[_Bounds], count: int) -> _Bounds:
    values, rows = (np.concatenate(each, axis=1) for each in zip(*parts, strict=True))
    return _largest(values, rows, count)


def _largest(values: np.ndarray, rows: np.ndarray, count: int) -> _Bounds:
    """The largest for each query, in no order, or all."""
    if values.shape[1] <= count:
        return values, rows
    places = np.argpartition(values, -count, axis=1)[:, -count:]
    return np.take_along_axis(values, places, axis=1), np.take_along_axis(rows, places, axis=1)


def best_of(values: np.ndarray, rows: np.ndarray, peaks: np.ndarray, count: int) -> Candidates:
    """The rows of the `count` largest bounds [M, n] of queries over their peaks, of n > count or of all there are."""
    order = np.argsort(-values, axis=1)
    rows, values = np.take_along_axis(rows, order, axis=1), np.take_along_axis(values, order, axis=1)
    found = min(count, int(np.isfinite(values).sum(1).min()))  # rows that are not kept are -inf
    limits = values[:, count] * peaks if values.shape[1] > count else np.full(len(values), -np.inf, np.float32)
    return Candidates(rows=rows[:, :found], limits=limits)


def bit_planes(cells: np.ndarray, count: int) -> np.ndarray:
    """Packed bits [M * count, W] of cells [M, W], the lowest first.

    A cell stands for 2 cell - 2^count + 1 = sum_j 2^j s_j of signs s_j, and <s_j, c> of sign codes is
    W - 2 popcount(s_j xor c).
    """
    bits = np.stack([(cells >> place) & 1 for place in range(count)], axis=1).astype(bool)
    return np.packbits(bits, axis=2, bitorder="little").reshape(len(cells) * count, -1)


def _as_planes(unit: np.ndarray, _: int) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    (count, width), top = unit.shape, (1 << PLANES) - 1
    cells = np.clip(np.floor(unit * (top / 2)) + (top + 1) // 2, 0, top).astype(np.int32)
    packed, weights = numkong.hammings_pack(bit_planes(cells, PLANES)), 2 ** np.arange(PLANES, dtype=np.float32)

    def products(codes: np.ndarray) -> np.ndarray:
        differing = np.asarray(numkong.hammings_packed(codes, packed)).astype(np.float32)  # sums are exact
        return np.float32(width) - differing.reshape(len(codes), count, PLANES) @ weights * np.float32(2 / top)

    return products, (2.0 * cells - top) / top


def _as_int8(unit: np.ndarray, bits: int) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """A stored cell c of b bits stands for 2 c - 2^b + 1 = 2 (c - 2^(b-1)) + 1."""
    each, half = 8 // bits, 1 << (bits - 1)
    coded = np.rint(unit * 127).astype(np.int8)
    packed = [numkong.dots_pack(np.ascontiguousarray(coded[:, place::each]), dtype="int8") for place in range(each)]
    sums = coded.sum(1, dtype=np.int32)

    def products(codes: np.ndarray) -> np.ndarray:
        out = np.zeros((len(codes), len(coded)), np.int32)
        for place, part in enumerate(packed):
            cells = (codes >> (place * bits)) & np.uint8(2 * half - 1)
            out += np.asarray(numkong.dots_packed((cells - np.uint8(half)).view(np.int8), part))
        return (2 * out + sums).astype(np.float32) / np.float32(127)

    return products, coded / 127.0


def _as_floats(unit: np.ndarray, bits: int) -> tuple[Callable[[np.ndarray], np.ndarray], np.ndarray]:
    kind = "float16" if bits == 16 else "float32"
    coded = unit.astype(kind)
    packed = numkong.dots_pack(coded, dtype=kind)

    def products(codes: np.ndarray) -> np.ndarray:
        return np.asarray(numkong.dots_packed(codes, packed)).astype(np.float32, copy=False)

    return products, coded.astype(np.float64)


_CODERS = {1: _as_planes, 2: _as_int8, 4: _as_int8, 8: _as_int8, 16: _as_floats, 32: _as_floats}
