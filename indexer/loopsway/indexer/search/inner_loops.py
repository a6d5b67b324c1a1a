"""The inner loops of a scan, compiled.

n rows, M queries, W width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from ..compiled import compiled

_LANES = 64  # values that are looked at together


@intrinsic
def _popcount(_context: Any, _word: Any) -> Any:

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


popcount: Any = _popcount  # how many bits are set; in a compiled loop only


@compiled
def round_to_bfloat16(values: np.ndarray, out: np.ndarray) -> None:
    """Rounds the bits of float16 numbers, uint16 [n, W], to those of bfloat16; below 2^-14 to that or to 0."""
    for row in range(len(values)):
        own, rounded_row = values[row], out[row]
        for place in range(len(own)):
            bits = own[place]
            size = np.uint16(bits & np.uint16(0x7FFF))
            even = np.uint16((size >> np.uint16(3)) & np.uint16(1))
            rounded = np.uint16(np.uint16(size + np.uint16(3) + even) >> np.uint16(3))
            # Exponents count from -15 in float16, from -127 in bfloat16, which keeps 7 bits of 10.
            normal = np.uint16(rounded + np.uint16(112 << 7))
            small = np.uint16(113 << 7) if size >= np.uint16(0x200) else np.uint16(0)
            rounded_row[place] = np.uint16((normal if size >= np.uint16(0x400) else small) | (bits & np.uint16(0x8000)))


@compiled
def rescale(products: np.ndarray, offset: np.ndarray, scale: np.ndarray, factors: np.ndarray, out: np.ndarray) -> None:
    """Writes (products [n, M] + offset [M]) scale [M] factors [n], float32 [M, n]."""
    for start in range(0, len(products), _LANES):
        tile, own_factors = products[start : start + _LANES], factors[start : start + _LANES]
        for query in range(len(offset)):
            own, add, times = out[query, start : start + _LANES], offset[query], scale[query]
            for row in range(len(own_factors)):
                own[row] = (np.float32(tile[row, query]) + add) * times * own_factors[row]


@compiled
def group_peaks(values: np.ndarray, highest: np.ndarray, lowest: np.ndarray) -> None:
    """The largest and smallest of each of G groups, [M, G], of values [M, n]: every G-th of a query is one group."""
    num_groups = highest.shape[1]
    for query in range(len(values)):
        row, peaks, lows = values[query], highest[query], lowest[query]
        peaks[:], lows[:] = row[:num_groups], row[:num_groups]
        for start in range(num_groups, len(row) - num_groups + 1, num_groups):
            own = row[start : start + num_groups]
            for group in range(num_groups):
                value, high, low = own[group], peaks[group], lows[group]
                peaks[group] = value if value > high else high  # max() minds NaN, which takes ten times as long
                lows[group] = value if value < low else low


@compiled
def reaching(
    estimates: np.ndarray,
    lengths: np.ndarray,
    slack: np.ndarray,
    high: np.ndarray,
    low: np.ndarray,
    out: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Writes the places where an estimate, give or take length x slack, reaches a floor.

    Args:
        estimates: float32 [M, n].
        lengths: float32 [n].
        slack: float32 [M].
        high: floors of estimates, float32 [M].
        low: floors of their negatives, float32 [M].
        out: int64 [M, c], of the places of each query, ascending.
        counts: int64 [M], how many there are; c + 1 if these are too many.
    """
    most = out.shape[1]
    for query in range(len(estimates)):
        row, own_slack, above, below = estimates[query], slack[query], high[query], low[query]
        count = 0
        for start in range(0, len(row), _LANES):
            own, own_lengths = row[start : start + _LANES], lengths[start : start + _LANES]
            some = np.int32(0)
            for place in range(len(own)):
                width = own_lengths[place] * own_slack
                some += np.int32((own[place] + width >= above) | (width - own[place] >= below))
            if some == 0 or count > most:
                continue
            for place in range(len(own)):
                width = own_lengths[place] * own_slack
                if own[place] + width >= above or width - own[place] >= below:
                    if count < most:
                        out[query, count] = start + place
                    count += 1
        counts[query] = min(count, most + 1)


@compiled
def take_in(
    numbers: np.ndarray,
    ends: np.ndarray,
    rows: np.ndarray,
    scores: np.ndarray,
    best_rows: np.ndarray,
    best_scores: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Takes scored rows in among the best of some queries: the k of largest, and the k of smallest score.

    Args:
        numbers: of the queries, int64 [m].
        ends: where the rows of each end, int64 [m].
        rows: int64 [n], ascending for each query.
        scores: theirs, float32 [n].
        best_rows: int64 [M, 2 k], from the largest score to the smallest; equal ones by row.
        best_scores: theirs, float32.
        counts: int64 [M], how many rows each query has; of equal scores the first rows, also of the smallest.
    """
    most, begin = best_rows.shape[1], 0
    k = most // 2
    for place in range(len(numbers)):
        query, end = numbers[place], ends[place]
        order = np.argsort(-scores[begin:end], kind="mergesort")
        num_known, total = counts[query], counts[query] + end - begin
        known_rows, known_scores = best_rows[query], best_scores[query]
        all_rows, all_scores = np.empty(total, np.int64), np.empty(total, np.float32)
        known = new = 0
        for at in range(total):
            is_known = new == len(order)
            if not is_known and known < num_known:
                row, score = rows[begin + order[new]], scores[begin + order[new]]
                is_known = known_scores[known] > score or (known_scores[known] == score and known_rows[known] < row)
            if is_known:
                all_rows[at], all_scores[at] = known_rows[known], known_scores[known]
                known += 1
            else:
                all_rows[at], all_scores[at] = rows[begin + order[new]], scores[begin + order[new]]
                new += 1
        first = below = max(0, total - k)  # the k smallest begin here, unless others are equal to the largest of them
        while first > 0 and total > most and all_scores[first - 1] == all_scores[total - k]:
            first -= 1
        while below < total and total > most and all_scores[below] == all_scores[total - k]:
            below += 1
        count, last_equal = 0, first + k - (total - below)
        for at in range(total):
            if total <= most or at < k or first <= at < last_equal or at >= below:
                known_rows[count], known_scores[count] = all_rows[at], all_scores[at]
                count += 1
        counts[query], begin = count, end


@compiled
def strongest(scores: np.ndarray, ends: np.ndarray, k: int, places: np.ndarray, counts: np.ndarray) -> None:
    """Writes the places of the k rows of largest score above zero, and of smallest below it, of each query.

    Args:
        scores: float32 [n], of one query's rows after another's, from the largest to the smallest; equal ones by row.
        ends: where those of each query end, int64 [M].
        k: rows of each sign.
        places: int64 [n], of the largest and then the smallest of each query, the strongest first; equal ones by row.
        counts: int64 [M, 2], how many of each.
    """
    begin = written = 0
    for query in range(len(ends)):
        end, before = ends[query], written
        for place in range(begin, min(end, begin + k)):
            if scores[place] > 0:
                places[written] = place
                written += 1
        counts[query, 0], before = written - before, written
        stop = end
        while stop > begin and scores[stop - 1] < 0 and written - before < k:
            first = stop - 1  # of those that are equal to the last
            while first > begin and scores[first - 1] == scores[first]:
                first -= 1
            for place in range(first, min(stop, first + k - (written - before))):
                places[written] = place
                written += 1
            stop = first
        counts[query, 1], begin = written - before, end
