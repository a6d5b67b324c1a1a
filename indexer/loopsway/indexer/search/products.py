"""Inner products of codes with float32 queries: what a scan scores rows exactly with, and what curation reads whole.

n rows, M queries, W width, L stored values of a row.

Sign bits meet a query in 24 bit planes (coded_queries.py): sums are of whole numbers, so that equal codes have equal
products whatever is beside them. Other codes are decoded, and summed in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import numkong
import numpy as np

from ..sketches.coding import decode
from .coded_queries import bit_planes, query_by_query

PLANES = 24  # of a query that meets sign bits: float32 holds no more
TILE_ROWS, TILE_QUERIES = 512, 32  # of sign bits: their counts stay in the cache
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
    weights = 2.0 ** np.arange(PLANES)
    ones = np.full(
        (1, queries.shape[1] // 8), 255, np.uint8
    )  # levels are odd; with these taken off, they are 2 (cell - half)
    groups = [cells[start : start + TILE_QUERIES] for start in range(0, len(cells), TILE_QUERIES)]
    planes = (query_by_query(bit_planes(group, PLANES)) for group in groups)
    packed = [numkong.hammings_pack(np.concatenate([each, ones])) for each in planes]
    scale, offset = peaks / (2 * (half - 1)), (weights.sum() - 1) * queries.shape[1]

    def products(codes: np.ndarray) -> np.ndarray:
        out = np.empty((len(codes), len(queries)))
        for start in range(0, len(codes), TILE_ROWS):
            rows = slice(start, start + TILE_ROWS)
            place = 0
            for columns in packed:
                differing = np.asarray(numkong.hammings_packed(codes[rows], columns)).astype(np.float64)
                count = differing.shape[1] // PLANES
                planes = differing[:, :-1].reshape(-1, count, PLANES) @ weights - differing[:, -1:]
                out[rows, place : place + count] = planes
                place += count
        return (offset - 2 * out) * scale

    return products
