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
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch

from .coded_queries import MORE_PLANES, CodedQueries, code_queries
from .inner_loops import group_peaks, reaching

ESTIMATES, STRETCH_ROWS = 1 << 23, 1 << 20  # held at once; of a query
SPARSE = 0.25  # with a smaller share of rows that may be found, a block's are copied out before they are multiplied
EXTRA = 16  # rows beyond k that are scored for a first floor
BATCH = 2048  # rows that are scored until floors rise again
TOO_MANY = 1 / 32  # of a stretch, and more than a batch: rows that reach a floor
GROUP = 32
FEW = 1 << 18  # numbers or bytes, for one thread
POSITIVE = float(np.finfo(np.float32).smallest_subnormal)

# Of numbers of queries, and rows int64 [n] with each: the exact scores of each, float64 [n].
Score = Callable[[Sequence[tuple[int, np.ndarray]]], list[np.ndarray]]
Taking = Generator[np.ndarray, np.ndarray, bool]
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


def scan(queries: np.ndarray, bits: int, rows: Rows, k: int, score: Score) -> list[Answer]:
    """The k rows of largest, and the k of smallest, score with each query, as far as these are above and below zero.

    As many threads read as torch has.

    Args:
        queries: rotated, float32 [M, W].
        bits: of a stored coordinate.
        rows: to scan.
        k: of each sign.
        score: scores rows exactly.

    Returns:
        For each query at most 2 k rows, among them the answer: of equal scores the first rows, also of the smallest.
    """
    rows, coded = rows.only_kept(), code_queries(queries, bits)
    best = [_Best(query, float(peak), k) for query, peak in enumerate(coded.peaks)]
    for blocks in _stretches(rows.blocks, len(queries)):
        num_rows = rows.blocks[blocks[-1]].stop - rows.blocks[blocks[0]].start
        most = max(BATCH, int(TOO_MANY * num_rows)) if bits == 1 else num_rows
        waiting = _taken(coded, best, rows, blocks, most, score)
        if waiting:
            more = code_queries(queries[[each.query for each in waiting]], bits, MORE_PLANES)
            _taken(more, waiting, rows, blocks, num_rows, score)
    return [each.answer for each in best]


def ranked(rows: np.ndarray, scores: np.ndarray) -> Answer:
    """Rows and their scores, the largest first as float32; equal ones by row."""
    scores = scores.astype(np.float32)
    order = np.lexsort((rows, -scores))
    return rows[order], scores[order]


def in_threads(function: Callable[[_T], _R], items: Iterable[_T], *, size: int = FEW) -> list[_R]:
    """What a function that waits for no other thread gives of each item, in as many threads as torch has.

    Args:
        function: what to do.
        items: with what.
        size: numbers, or bytes of codes, that it reads in all: few are read sooner than another thread is woken.
    """
    items, count = list(items), torch.get_num_threads()
    if len(items) == 1 or count == 1 or size < FEW:
        return [function(item) for item in items]
    results: list[Any] = [None] * len(items)

    def share(first: int) -> None:
        for place in range(first, len(items), count):
            results[place] = function(items[place])

    list(_threads(count).map(share, range(count)))
    return results


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


def _taken(
    coded: CodedQueries, best: Sequence[_Best], rows: Rows, blocks: Sequence[int], most: int, score: Score
) -> list[_Best]:
    """Takes in a stretch; gives those for which more than `most` rows reach a floor, which did not."""
    start, stop = rows.blocks[blocks[0]].start, rows.blocks[blocks[-1]].stop
    estimates = np.empty((len(best), stop - start), np.float32)

    def fill(block: int) -> None:
        own = rows.blocks[block]
        _estimate(coded, rows, block, estimates[:, own.start - start : own.stop - start])

    in_threads(fill, blocks)
    lengths = rows.factors[start:stop] * np.float32(rows.longest)
    taking = {
        each: each.take(start, own, lengths, slack, most)
        for each, own, slack in zip(best, estimates, coded.slack, strict=True)
    }
    waiting, scores = list[_Best](), list[np.ndarray | None]([None] * len(best))
    while taking:  # rows of all queries are scored together
        each_next = zip(taking.values(), scores, strict=True)
        wanted = in_threads(lambda each: _next(each[0], each[1]), each_next, size=estimates.size)
        waiting += [each for each, rows in zip(taking, wanted, strict=True) if rows is None]
        asked = [(each, rows) for each, rows in zip(taking, wanted, strict=True) if rows is not None and len(rows)]
        taking = {each: taking[each] for each, _ in asked}
        scores = score([(each.query, rows) for each, rows in asked])
    return waiting


def _next(taking: Taking, scores: np.ndarray | None) -> np.ndarray | None:
    """The rows that are scored next, none at the end; None where too many would have to be."""
    try:
        return next(taking) if scores is None else taking.send(scores)
    except StopIteration as end:
        return np.empty(0, np.int64) if end.value else None


def _estimate(coded: CodedQueries, rows: Rows, block: int, out: np.ndarray) -> None:
    """Writes the estimates [M, n] of a block, which is not read where all are 0."""
    factors = rows.factors[rows.blocks[block].start : rows.blocks[block].stop]
    if np.count_nonzero(factors) > SPARSE * len(factors):
        coded.estimate(rows.codes(block), factors, out)
        return
    out[...] = 0
    live = np.flatnonzero(factors)
    if len(live):
        few = np.empty((len(out), len(live)), np.float32)
        coded.estimate(rows.codes(block)[live], factors[live], few)
        out[:, live] = few


class _Best:
    """The best rows of one query so far.

    Args:
        query: its number.
        peak: of the query.
        k: of each sign.
    """

    def __init__(self, query: int, peak: float, k: int) -> None:
        self.query, self._peak, self._k = query, peak, k
        self.answer: Answer = np.empty(0, np.int64), np.empty(0, np.float32)
        self._high = self._low = np.float32(POSITIVE)  # floors: of estimates, and of their negatives

    def take(self, start: int, estimates: np.ndarray, lengths: np.ndarray, slack: np.float32, most: int) -> Taking:
        """Takes in a stretch that begins with the row `start`; not all of it, and False, if more rows reach a floor.

        Yields rows, and is sent their scores. Estimates of rows that are taken in become NaN, which reaches nothing.
        """
        known = self.answer[0] - start  # those of this stretch: taken in when the query met fewer planes
        known = known[(known >= 0) & (known < len(estimates))]
        estimates[known] = np.nan
        if not len(known):
            first = _extremes(estimates, self._k + EXTRA)
            if len(first):
                self._add(first + start, (yield first + start))
                estimates[first] = np.nan
        rows = np.empty(min(most, len(estimates)), np.int64)
        count = reaching(estimates, lengths, slack, self._high, self._low, rows)
        if count > len(rows):
            return False
        rows = rows[:count]
        widths, estimates = lengths[rows] * slack, estimates[rows]
        order = np.argsort(-self._above(estimates, widths))
        rows, widths, estimates = rows[order], widths[order], estimates[order]
        while len(rows):
            now = rows[:BATCH] + start
            self._add(now, (yield now))
            rows, widths, estimates = rows[BATCH:], widths[BATCH:], estimates[BATCH:]
            left = self._above(estimates, widths) >= 0
            rows, widths, estimates = rows[left], widths[left], estimates[left]
        return True

    def _above(self, estimates: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """By how much a row may exceed a floor; below 0 it can't reach any."""
        return np.maximum(estimates + widths - self._high, widths - estimates - self._low)

    def _add(self, rows: np.ndarray, scores: np.ndarray) -> None:
        k, (known, known_scores) = self._k, self.answer
        rows, scores = ranked(np.concatenate([known, rows]), np.concatenate([known_scores, scores.astype(np.float32)]))
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
    highest, lowest = estimates, estimates
    num_groups = len(estimates) // GROUP
    if num_groups > 4 * count:  # the peaks of groups are much fewer: the count-th of them will do
        highest, lowest = np.empty(num_groups, np.float32), np.empty(num_groups, np.float32)
        group_peaks(estimates, num_groups, highest, lowest)
    high, low = (max(_reached(peaks, count), np.float32(POSITIVE)) for peaks in (highest, -lowest))
    rows = np.empty(8 * count, np.int64)  # of equal ones any will do
    return rows[: reaching(estimates, estimates, np.float32(0), high, low, rows)]


def _reached(values: np.ndarray, count: int) -> np.float32:
    """A value that at least `count` reach, and not many more; the least of fewer."""
    place = max(0, len(values) - count)
    return np.partition(values, place)[place]
