"""Bit planes of queries, and their products with sign codes: xor and popcount.

n rows, M queries, P planes, W width, L words of a row of codes.

A cell of P bits stands for the odd number 2 cell - 2^P + 1 = sum_j 2^j s_j of signs s_j, its planes; and <s_j, c> of
sign codes is W - 2 popcount(s_j xor c). So products are sums of whole numbers, and equal codes have equal ones.
"""

from __future__ import annotations

import numpy as np

from ..compiled import compiled
from .inner_loops import popcount

TOGETHER = 4  # planes that meet a word of codes while it is in a register; P is a multiple of it
TILE_BYTES = 16 << 10  # of codes: they stay in the nearest cache while all queries meet them


def bit_planes(cells: np.ndarray, count: int) -> np.ndarray:
    """Packed bits, uint8 [M, count, W / 8], of cells [M, W], the lowest first."""
    masks = (1 << np.arange(8, dtype=np.uint8))[None, :, None]  # packbits takes any number but 0 for a one
    parts = [(cells[:, None] >> place).astype(np.uint8) & masks[:, : count - place] for place in range(0, count, 8)]
    return np.packbits(np.concatenate(parts, axis=1), axis=2, bitorder="little")


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


def _words(packed: np.ndarray) -> np.ndarray:
    """As read-only uint64, or where a row is no whole number of them as they are."""
    words = packed.view(np.uint64 if packed.shape[-1] % 8 == 0 else np.uint8)
    words.flags.writeable = False  # Numba would compile once more
    return words


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
