"""Inner products of codes with float32 queries: what a scan scores rows exactly with, and what curation reads whole.

n rows, M queries, W width, L stored values of a row.

Sign bits meet a query in 24 bit planes (planes.py): sums are of whole numbers, so that equal codes have equal products
whatever is beside them. Other codes are decoded, and summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..sketches.coding import decode
from .planes import TOGETHER, bit_planes, write_products

PLANES = 24  # of a query that meets sign bits: float32 holds no more
TILE_BYTES = 1 << 20  # of decoded rows, at the least: they stay in the cache, and in the same memory


def exact_products(queries: np.ndarray, bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """Gives <query, codes>, float64 [n, M], of codes [n, L], without their factors.

    Args:
        queries: rotated, float32 [M, W].
        bits: of the codes.
    """
    if bits == 1:
        return _sign_products(queries)
    exact = queries.astype(np.float64).T  # [W, M]

    together = max(1, max(TILE_BYTES, exact.nbytes) // (8 * len(exact)))
    ones = np.ones(together, np.float32)

    def products(codes: np.ndarray) -> np.ndarray:
        out = np.empty((len(codes), exact.shape[1]))
        for start in range(0, len(codes), together):
            tile = codes[start : start + together]
            np.matmul(
                decode(tile, ones[: len(tile)], bits).astype(np.float64), exact, out=out[start : start + together]
            )
        return out

    return products


def _sign_products(queries: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    peaks = np.abs(queries).max(1).astype(np.float64)
    peaks[peaks == 0] = 1
    half = 1 << (PLANES - 1)
    cells = np.rint(queries / peaks[:, None] * (half - 1)).astype(np.int32) + half
    planes, ones = bit_planes(cells, PLANES), np.full((1, TOGETHER, queries.shape[1] // 8), 255, np.uint8)
    scale, unit = peaks / (2 * (half - 1)), np.full(1, 1 / ((1 << TOGETHER) - 1))

    def products(codes: np.ndarray) -> np.ndarray:
        factors, out, sums = np.ones(len(codes)), np.empty((len(queries), len(codes))), np.empty((1, len(codes)))
        write_products(codes, planes, np.ones(len(queries)), factors, out)
        write_products(codes, ones, unit, factors, sums)
        out -= np.rint(sums)  # levels are odd; with these taken off, they are 2 (cell - half)
        out *= scale[:, None]
        return out.T

    return products
