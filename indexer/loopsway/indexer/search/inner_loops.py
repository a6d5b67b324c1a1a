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
def group_peaks(values: np.ndarray, num_groups: int, highest: np.ndarray, lowest: np.ndarray) -> None:
    """The largest and smallest of each group, float32 [num_groups], of values [n]: every num_groups-th is one group."""
    highest[:], lowest[:] = values[:num_groups], values[:num_groups]
    for start in range(num_groups, len(values) - num_groups + 1, num_groups):
        own = values[start : start + num_groups]
        for group in range(num_groups):
            value, high, low = own[group], highest[group], lowest[group]
            highest[group] = value if value > high else high  # max() minds NaN, which takes ten times as long
            lowest[group] = value if value < low else low


@compiled
def reaching(
    estimates: np.ndarray, lengths: np.ndarray, slack: np.float32, high: np.float32, low: np.float32, out: np.ndarray
) -> int:
    """Writes the places where an estimate [n], give or take length x slack, reaches `high` or -`low`.

    Returns:
        How many there are; one more than `out` holds if these are too many for it.
    """
    count = 0
    for start in range(0, len(estimates), _LANES):
        own, own_lengths = estimates[start : start + _LANES], lengths[start : start + _LANES]
        some = np.int32(0)
        for place in range(len(own)):
            width = own_lengths[place] * slack
            some += np.int32((own[place] + width >= high) | (width - own[place] >= low))
        if some == 0:
            continue
        for place in range(len(own)):
            width = own_lengths[place] * slack
            if own[place] + width >= high or width - own[place] >= low:
                if count == len(out):
                    return count + 1
                out[count] = start + place
                count += 1
    return count
