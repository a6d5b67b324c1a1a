"""Inner products of codes with float32 queries: what a scan scores rows exactly with, and what curation reads whole.

n rows, M queries, W width, L stored values of a row.

Sign bits meet a query in 24 bit planes (planes.py): sums are of whole numbers, so that equal codes have equal products
whatever is beside them. Other codes are decoded, and summed in float64.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..sketches.coding import decode
from .planes import exact_planes, sign_sums, write_own_products, write_products

TILE_BYTES = 1 << 20  # of decoded rows, at the least: they stay in the cache, and in the same memory


class ExactProducts:
    """Gives <query, codes> without the codes' factors.

    Args:
        queries: rotated, float32 [M, W].
        bits: of the codes.
    """

    def __init__(self, queries: np.ndarray, bits: int) -> None:
        self._bits = bits
        if bits == 1:
            self._planes, self._units = exact_planes(queries)
        else:
            self._exact = queries.astype(np.float64)

    def of_all(self, codes: np.ndarray) -> np.ndarray:
        """Of codes [n, L] with every query, float64 [n, M]."""
        if self._bits > 1:
            return self._decoded(codes, self._exact)
        factors, out = np.ones(len(codes)), np.empty((len(self._units), len(codes)))
        write_products(codes, self._planes, np.ones(len(self._units)), factors, out)
        out -= sign_sums(codes)  # levels are odd; with these taken off, they are 2 (cell - half)
        out *= self._units[:, None]
        return out.T

    def of_own(self, codes: np.ndarray, whose: np.ndarray) -> np.ndarray:
        """Of each of codes [n, L] with its own query, whose number is in int64 [n]: float64 [n]."""
        out = np.empty(len(codes))
        if self._bits == 1:
            write_own_products(codes, whose, self._planes, self._units, out)
            return out
        starts = np.flatnonzero(np.diff(whose, prepend=-1)).tolist()
        for start, stop in pairwise([*starts, len(codes)]):
            query = whose[start]
            out[start:stop] = self._decoded(codes[start:stop], self._exact[query : query + 1])[:, 0]
        return out

    def _decoded(self, codes: np.ndarray, queries: np.ndarray) -> np.ndarray:
        out = np.empty((len(codes), len(queries)))
        together = max(1, max(TILE_BYTES, queries.nbytes) // (8 * queries.shape[1]))
        ones = np.ones(together, np.float32)
        for start in range(0, len(codes), together):
            tile = codes[start : start + together]
            values = decode(tile, ones[: len(tile)], self._bits).astype(np.float64)
            np.matmul(values, queries.T, out=out[start : start + together])
        return out
