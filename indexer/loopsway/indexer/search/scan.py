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
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch

from .coded_queries import MORE_PLANES, CodedQueries, code_queries
from .inner_loops import group_peaks, reaching, take_in

ESTIMATES, STRETCH_ROWS = 1 << 23, 1 << 20  # held at once; of a query
SPARSE = 0.25  # with a smaller share of rows that may be found, a block's are copied out before they are multiplied
EXTRA = 16  # rows beyond k that are scored for a first floor
BATCH = 2048  # rows that are scored until floors rise again
TOO_MANY = 1 / 32  # of a stretch, and more than a batch: rows that reach a floor
GROUP = 32
FEW = 32 << 20  # bytes of codes that meet one query, for one thread: some 0.8 ms
COMPARING = 3  # times what a byte of codes takes, for one of estimates
POSITIVE = float(np.finfo(np.float32).smallest_subnormal)

# Of queries, by their numbers int64 [n] in groups, and a row for each, int64 [n]: the exact scores, float64 [n].
Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
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
        row_bytes: of a row of codes.
        kept: bool [N], those that may be found; None: all.
    """

    blocks: Sequence[range]
    codes: Callable[[int], np.ndarray]
    factors: np.ndarray
    longest: float
    row_bytes: int
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
    best, every = _Best(coded.peaks, min(k, len(rows.factors))), np.arange(len(queries))
    for blocks in _stretches(rows.blocks, len(queries)):
        stretch = _Stretch(rows, blocks)
        most = max(BATCH, int(TOO_MANY * len(stretch.rows))) if bits == 1 else len(stretch.rows)
        waiting = _taken(stretch, coded, every, best, most, score)
        if len(waiting):
            more = code_queries(queries[waiting], bits, MORE_PLANES)
            _taken(stretch, more, waiting, best, len(stretch.rows), score, again=True)
    return best.answers()


def scored(score: Score, asked: Sequence[tuple[int, np.ndarray]]) -> list[np.ndarray]:
    """Exact scores, float64 [n], of the rows int64 [n] that go with each query by its number."""
    if not asked:
        return []
    counts = [len(rows) for _, rows in asked]
    scores = score(np.repeat([query for query, _ in asked], counts), np.concatenate([rows for _, rows in asked]))
    return np.split(scores, np.cumsum(counts)[:-1])


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
        size: bytes of codes that meet a query in all, or as much work: little is done sooner than a thread is woken.
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


def in_shares(function: Callable[[slice], object], start: int, stop: int, *, size: int = FEW) -> None:
    """Calls a function as `in_threads`, with about as many numbers from `start` to `stop` for each thread."""
    count = torch.get_num_threads() if size >= FEW else 1
    edges = [start + share * (stop - start) // count for share in range(count + 1)]
    in_threads(function, [slice(*own) for own in pairwise(edges) if own[0] < own[1]], size=size)


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


class _Stretch:
    """Rows of some blocks.

    Attributes:
        rows: their numbers.
        lengths: float32 [n], of their codes.
    """

    def __init__(self, rows: Rows, blocks: Sequence[int]) -> None:
        self.rows = range(rows.blocks[blocks[0]].start, rows.blocks[blocks[-1]].stop)
        self.lengths = rows.factors[self.rows.start : self.rows.stop] * np.float32(rows.longest)
        self._all, self._blocks = rows, blocks

    def estimates(self, coded: CodedQueries) -> np.ndarray:
        """Of all rows with each query, float32 [M, n]."""
        out = np.empty((len(coded.scale), len(self.rows)), np.float32)

        def fill(block: int) -> None:
            own = self._all.blocks[block]
            _estimate(coded, self._all, block, out[:, own.start - self.rows.start : own.stop - self.rows.start])

        in_threads(fill, self._blocks, size=out.size * self._all.row_bytes)
        return out


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


def _taken(
    stretch: _Stretch,
    coded: CodedQueries,
    queries: np.ndarray,
    best: _Best,
    most: int,
    score: Score,
    *,
    again: bool = False,
) -> np.ndarray:
    """Takes in a stretch for some queries; gives those for which more than `most` rows reach a floor, which did not.

    Args:
        stretch: the rows.
        coded: the queries.
        queries: their numbers, int64 [m].
        best: the best rows of all queries.
        most: rows that may reach a floor.
        score: scores rows exactly.
        again: whether some rows were taken in already, when the queries met fewer planes.
    """
    estimates, start = stretch.estimates(coded), stretch.rows.start
    numbers: list[int] = queries.tolist()
    if again:
        known = best.within(numbers, stretch.rows)
    else:
        known = _extremes(estimates, stretch.lengths, best.k + EXTRA)
        best.add([(query, rows + start) for query, rows in zip(numbers, known, strict=True)], score)
    for own, rows in zip(estimates, known, strict=True):
        own[rows] = np.nan  # which reaches nothing
    high, low = best.high[queries], best.low[queries]
    reach, are_too_many = _reached(estimates, stretch.lengths, coded.slack, high, low, most)

    def above(query: int, rows: np.ndarray) -> np.ndarray:
        """By how much a row may exceed a floor; below 0 it can't reach any."""
        widths, own = stretch.lengths[rows] * coded.slack[query], estimates[query, rows]
        return np.maximum(own + widths - best.high[numbers[query]], widths - own - best.low[numbers[query]])

    left = {}
    for query, rows in enumerate(reach):
        if len(rows) and not are_too_many[query]:
            left[query] = rows if len(rows) <= BATCH else rows[np.argsort(-above(query, rows))]
    while left:  # rows of all queries are scored together
        best.add([(numbers[query], np.sort(rows[:BATCH]) + start) for query, rows in left.items()], score)
        left = {query: rows[BATCH:] for query, rows in left.items() if len(rows) > BATCH}
        left = {query: rows[above(query, rows) >= 0] for query, rows in left.items()}
        left = {query: rows for query, rows in left.items() if len(rows)}
    return queries[are_too_many]


class _Best:
    """The best rows of each query so far.

    Args:
        peaks: of the queries, float32 [M].
        k: rows of each sign.

    Attributes:
        k: the same.
        high: float32 [M]; what can't reach it is not among the k largest.
        low: float32 [M]; nor that whose negative can't reach this among the k smallest.
    """

    def __init__(self, peaks: np.ndarray, k: int) -> None:
        self.k, self._peaks = k, peaks.astype(np.float64)
        self._rows, self._scores = np.empty((len(peaks), 2 * k), np.int64), np.empty((len(peaks), 2 * k), np.float32)
        self._counts = np.zeros(len(peaks), np.int64)
        self.high, self.low = (np.full(len(peaks), POSITIVE, np.float32) for _ in range(2))

    def answers(self) -> list[Answer]:
        each = zip(self._rows, self._scores, self._counts, strict=True)
        return [(rows[:count], scores[:count]) for rows, scores, count in each]

    def within(self, queries: Sequence[int], rows: range) -> list[np.ndarray]:
        """The best rows of some queries that are among some rows, by their places there."""
        answers = self.answers()
        places = [answers[query][0] - rows.start for query in queries]
        return [own[(own >= 0) & (own < len(rows))] for own in places]

    def add(self, asked: Sequence[tuple[int, np.ndarray]], score: Score) -> None:
        """Takes rows in, of queries by their numbers; they are ascending."""
        numbers = np.array([query for query, _ in asked])
        counts = [len(rows) for _, rows in asked]
        rows = np.concatenate([rows for _, rows in asked])
        if not len(rows):
            return
        scores = score(np.repeat(numbers, counts), rows).astype(np.float32)
        take_in(numbers, np.cumsum(counts), rows, scores, self._rows, self._scores, self._counts)
        full = np.flatnonzero(self._counts >= self.k)
        self.high[full] = self._floors(full, self._scores[full, self.k - 1])
        self.low[full] = self._floors(full, -self._scores[full, self._counts[full] - self.k])

    def _floors(self, queries: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """What a row must reach to have this score after rounding, and to have any."""
        return np.maximum(np.nextafter(scores, np.float32(-math.inf)) / self._peaks[queries], POSITIVE)


def _extremes(estimates: np.ndarray, lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """Rows of each query's largest estimates above 0 and smallest below: about `count` of each, if there are so many.

    Args:
        estimates: [M, n].
        lengths: of the rows, [n].
        count: of each sign.
    """
    high, low = np.empty(len(estimates), np.float32), np.empty(len(estimates), np.float32)
    num_groups = estimates.shape[1] // GROUP

    def find(own: slice) -> None:
        highest = lowest = estimates[own]
        if num_groups > 4 * count:  # the peaks of groups are much fewer: the count-th of them will do
            highest, lowest = (np.empty((len(highest), num_groups), np.float32) for _ in range(2))
            group_peaks(estimates[own], highest, lowest)
        place = min(count, highest.shape[1]) - 1
        for query, peaks, lows in zip(range(own.start, own.stop), highest, lowest, strict=True):
            high[query], low[query] = -np.partition(-peaks, place)[place], -np.partition(lows, place)[place]

    in_shares(find, 0, len(estimates), size=COMPARING * estimates.nbytes)
    np.maximum(high, POSITIVE, out=high)
    np.maximum(low, POSITIVE, out=low)
    # Of equal ones any will do.
    return _reached(estimates, lengths, np.zeros(len(estimates), np.float32), high, low, 8 * count)[0]


def _reached(
    estimates: np.ndarray, lengths: np.ndarray, slack: np.ndarray, high: np.ndarray, low: np.ndarray, most: int
) -> tuple[list[np.ndarray], np.ndarray]:
    """For each query the first places, at most `most`, where an estimate may reach a floor; and whether there are more.

    Args:
        estimates: [M, n].
        lengths: of the rows, [n].
        slack: [M]; times a length, what an estimate may be off by.
        high: floors, [M].
        low: floors of the negatives, [M].
        most: places of a query.
    """
    places = np.empty((len(estimates), min(most, estimates.shape[1])), np.int64)
    counts = np.empty(len(estimates), np.int64)

    def find(own: slice) -> None:
        reaching(estimates[own], lengths, slack[own], high[own], low[own], places[own], counts[own])

    in_shares(find, 0, len(estimates), size=COMPARING * estimates.nbytes)
    return [own[:count] for own, count in zip(places, counts, strict=True)], counts > places.shape[1]
