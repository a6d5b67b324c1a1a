"""Scans the codes of one slot: the k best rows of either sign, exactly, for many queries in one pass.

N rows, n rows of a stretch, M queries, L stored values of a row.

A row is read once, for an *estimate* of its score that may be off by a known *width* (coded_queries.py). A *floor* is
the k-th best exact score of a sign so far, or just above zero: a row that can't reach it with estimate and width is
out, others are scored exactly, those that may exceed it most first, and floors rise. So nothing that is left out could
be among the best, and nothing is scanned again, unless too many rows of sign bits reach a floor (near copies, or rows
all alike): then their query meets more of its bit planes.

Rows are taken in stretches, of whole blocks, so that at most `ESTIMATES` are held, 32 MiB. Beside them a thread needs a
few arrays of one number for each row of a stretch, at most `STRETCH_ROWS`, 4 MiB each, and what exact scores of a batch
need: some 70 MiB with two threads. (A single block is a stretch, however large.) Estimates, widths and floors are those
of queries over their peaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import numpy as np
import torch

from .coded_queries import MORE_PLANES, CodedQueries, code_queries

ESTIMATES, STRETCH_ROWS = 1 << 23, 1 << 20  # held at once; of a query
SPARSE = 0.25  # with a smaller share of rows that may be found, a block's are copied out before they are multiplied
EXTRA = 16  # rows beyond k that are scored for a first floor
BATCH = 2048  # rows that are scored until floors rise again
TOO_MANY = 1 / 32  # of a stretch, and more than a batch: rows that reach a floor
GROUP = 32
POSITIVE = float(np.finfo(np.float32).smallest_subnormal)

Scored = Callable[[np.ndarray], np.ndarray]  # of rows int64 [n]: their exact scores, float64 [n]
Answer = tuple[
    np.ndarray, np.ndarray
]  # rows int64 [c], and their scores, float32, the largest first; equal ones by row

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The rows to scan.

    Attributes:
        blocks: their numbers, block by block.
        codes: reads a block's codes [n, L].
        factors: float32 [N], of the codes; 0 for a row of zeros.
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

    def only_kept(self) -> Rows:
        """The same, where rows that may not be found are rows of zeros, which no search finds."""
        if self.kept is None:
            return self
        return replace(self, factors=np.where(self.kept, self.factors, np.float32(0)), kept=None)


def scan(queries: np.ndarray, bits: int, rows: Rows, k: int, exact: Callable[[np.ndarray], Scored]) -> list[Answer]:
    """The k rows of largest, and the k of smallest, score with each query, as far as these are above and below zero.

    As many threads read as torch has.

    Args:
        queries: rotated, float32 [M, W].
        bits: of a stored coordinate.
        rows: to scan.
        k: of each sign.
        exact: gives what scores rows exactly, of a query [W].

    Returns:
        For each query at most 2 k rows, among them the answer: of equal scores the first rows, also of the smallest.
    """
    rows, coded = rows.only_kept(), code_queries(queries, bits)
    best = in_threads(lambda asked: _Best(exact(asked[0]), float(asked[1]), k), zip(queries, coded.peaks, strict=True))
    for blocks in _stretches(rows.blocks, len(queries)):
        num_rows = rows.blocks[blocks[-1]].stop - rows.blocks[blocks[0]].start
        most = max(BATCH, int(TOO_MANY * num_rows)) if bits == 1 else num_rows
        waiting = _taken(coded, best, rows, blocks, most)
        if waiting:
            more = code_queries(queries[waiting], bits, MORE_PLANES)
            _taken(more, [best[query] for query in waiting], rows, blocks, num_rows)
    return [each.answer for each in best]


def ranked(rows: np.ndarray, scores: np.ndarray) -> Answer:
    """Rows and their scores, the largest first as float32; equal ones by row."""
    scores = scores.astype(np.float32)
    order = np.lexsort((rows, -scores))
    return rows[order], scores[order]


def in_threads(function: Callable[[_T], _R], items: Iterable[_T]) -> list[_R]:
    """What a function that waits for no other thread gives of each item, in as many threads as torch has."""
    items = list(items)
    if len(items) == 1:
        return [function(items[0])]
    return list(_threads(torch.get_num_threads()).map(function, items))


@cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, "loopsway-scan")


def _stretches(blocks: Sequence[range], num_queries: int) -> Iterator[list[int]]:
    """Numbers of blocks whose estimates are held at once."""
    most, stretch, size = min(ESTIMATES // num_queries, STRETCH_ROWS), [], 0
    for block, own in enumerate(blocks):
        if stretch and size + len(own) > most:
            yield stretch
            stretch, size = [], 0
        stretch.append(block)
        size += len(own)
    if stretch:
        yield stretch


def _taken(coded: CodedQueries, best: Sequence[_Best], rows: Rows, blocks: Sequence[int], most: int) -> list[int]:
    """Takes in a stretch; the places of those queries for which more than `most` rows reach a floor, which did not."""
    start, stop = rows.blocks[blocks[0]].start, rows.blocks[blocks[-1]].stop
    estimates = np.empty((len(best), stop - start), np.float32)

    def fill(share: Sequence[int]) -> None:
        for block in share:
            own = rows.blocks[block]
            _estimate(coded, rows, block, estimates[:, own.start - start : own.stop - start])

    shares = np.array_split(np.array(blocks), min(torch.get_num_threads(), len(blocks)))
    in_threads(fill, [share.tolist() for share in shares])
    lengths = rows.factors[start:stop] * np.float32(rows.longest)
    taken = in_threads(
        lambda place: best[place].take(start, estimates[place], lengths * coded.slack[place], most), range(len(best))
    )
    return [place for place, done in enumerate(taken) if not done]


def _estimate(coded: CodedQueries, rows: Rows, block: int, out: np.ndarray) -> None:
    """Writes the estimates [M, n] of a block, which is not read where all are 0."""
    factors = rows.factors[rows.blocks[block].start : rows.blocks[block].stop]
    if np.count_nonzero(factors) > SPARSE * len(factors):
        coded.estimate(rows.codes(block), out)
        out *= factors
        return
    out[...] = 0
    live = np.flatnonzero(factors)
    if len(live):
        few = np.empty((len(out), len(live)), np.float32)
        coded.estimate(rows.codes(block)[live], few)
        out[:, live] = few * factors[live]


class _Best:
    """The best rows of one query so far.

    Args:
        scored: scores rows.
        peak: of the query.
        k: of each sign.
    """

    def __init__(self, scored: Scored, peak: float, k: int) -> None:
        self._scored, self._peak, self._k = scored, peak, k
        self.answer: Answer = np.empty(0, np.int64), np.empty(0, np.float32)
        self._high = self._low = np.float32(POSITIVE)  # floors: of estimates, and of their negatives

    def take(self, start: int, estimates: np.ndarray, widths: np.ndarray, most: int) -> bool:
        """Takes in a stretch that begins with the row `start`; not all of it, and False, if more rows reach a floor."""
        known = self.answer[0] - start  # those of this stretch: taken in when the query met fewer planes
        known = known[(known >= 0) & (known < len(estimates))]
        first = np.setdiff1d(_extremes(estimates, self._k + EXTRA), known)
        self._add(first + start)
        reach = self._above(estimates, widths) >= 0
        reach[first] = reach[known] = False
        rows = np.flatnonzero(reach)
        if len(rows) > most:
            return False
        rows = rows[np.argsort(-self._above(estimates[rows], widths[rows]))]
        while len(rows):
            self._add(np.sort(rows[:BATCH]) + start)
            rows = rows[BATCH:]
            rows = rows[self._above(estimates[rows], widths[rows]) >= 0]
        return True

    def _above(self, estimates: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """By how much a row may exceed a floor; below 0 it can't reach any."""
        return np.maximum(estimates + widths - self._high, widths - estimates - self._low)

    def _add(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        k, (known, scores) = self._k, self.answer
        own = self._scored(rows).astype(np.float32)
        rows, scores = ranked(np.concatenate([known, rows]), np.concatenate([scores, own]))
        if len(rows) >= k:
            self._high, self._low = self._floor(scores[k - 1]), self._floor(-scores[-k])
        if len(rows) > 2 * k:  # of equal scores the first rows, also of the least
            best = np.union1d(np.arange(k), np.lexsort((rows, scores))[:k])
            rows, scores = rows[best], scores[best]
        self.answer = rows, scores

    def _floor(self, score: np.float32) -> np.float32:
        """What a row must reach to have this score after rounding, and to have any."""
        return np.float32(max(float(np.nextafter(score, np.float32(-math.inf))) / self._peak, POSITIVE))


def _extremes(estimates: np.ndarray, count: int) -> np.ndarray:
    """Rows of the largest estimates above 0 and the smallest below: about `count` of each, if there are so many."""
    most, least = max(_reached(estimates, count), POSITIVE), max(_reached(-estimates, count), POSITIVE)
    return np.flatnonzero((estimates >= most) | (estimates <= -least))[: 8 * count]  # of equal ones any will do


def _reached(values: np.ndarray, count: int) -> float:
    """A value that at least `count` reach, and not many more; the least of fewer."""
    groups = len(values) // GROUP
    if groups > 4 * count:  # the largest of each group are much fewer: the count-th of them will do
        values = values[: groups * GROUP].reshape(GROUP, groups).max(0)
    place = max(0, len(values) - count)
    return float(np.partition(values, place)[place])
