"""Top-k search over the stored rows of one slot: FAISS finds candidates, the store's codes decide.

N rows, M queries, W width, k results of each sign.

The FAISS index of a slot holds the decoded rows, all multiplied by one number: sign bits in IndexRaBitQ for 1-bit codes
(whose scores then equal a reading of the codes), a scalar quantizer or flat vectors for the others. Its candidates are
scored again with the codes themselves and the float32 query.

This is the only file that imports faiss.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .coding import decode
from .manifest import IndexDamagedError
from .store import Generation

QUERY_BITS = 8  # of a query in RaBitQ's scan; 8 lose nothing measurable before scoring again
EXTRA_CANDIDATES = 32
DECODED_BYTES = 256 << 20  # of candidates that one search decodes at once


class Slot:
    """One step of a generation, or its total.

    Args:
        generation: the stored rows.
        step: its number; None is the total over steps.
        factors: [N] of the codes.
        norms: [N] of the sketches.
    """

    def __init__(self, generation: Generation, step: int | None, *, factors: np.ndarray, norms: np.ndarray) -> None:
        self.step, self.factors, self.norms = step, factors, norms
        self._generation, self._bits = generation, generation.plan.config.bits
        self._faiss: Any = None

    @property
    def file_name(self) -> str:
        return "total.faiss" if self.step is None else f"step-{self.step:04d}.faiss"

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Decoded rows, float32 [n, W]."""
        return decode(self._generation.codes(self.step, rows), self.factors[rows], self._bits)

    def blocks(self) -> Iterator[np.ndarray]:
        """All decoded rows in order, a block at a time, float32 [n, W]."""
        plan = self._generation.plan
        for block in range(plan.num_blocks):
            rows = plan.rows_of(block)
            factors = self.factors[rows.start : rows.stop]
            yield decode(self._generation.block_codes(self.step, block), factors, self._bits)

    def build(self, folder: Path) -> None:
        """Makes the slot's FAISS index and writes it into a folder."""
        faiss = import_faiss()
        index = _new_index(faiss, self._generation.plan.width, self._bits)
        scale = self._scale()
        index.train(self._extremes(scale))
        for rows in self.blocks():
            index.add(rows * np.float32(scale))
        faiss.write_index(index, str(folder / self.file_name))
        self._faiss = index

    def load(self, folder: Path) -> None:
        """Opens the slot's FAISS index, memory-mapped where FAISS can."""
        faiss, file = import_faiss(), folder / self.file_name
        try:
            index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
        except RuntimeError as error:
            raise IndexDamagedError(f"FAISS index {file} can't be read: {error}") from error
        expected = (len(self.factors), self._generation.plan.width)
        if (index.ntotal, index.d) != expected:
            raise IndexDamagedError(f"FAISS index {file} has (rows, width) {(index.ntotal, index.d)}, not {expected}")
        self._faiss = index

    def unload(self) -> None:
        """Frees the FAISS index."""
        self._faiss = None

    def search(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """The k rows of largest and the k of smallest estimated inner product with each rotated query.

        Args:
            queries: float32 [M, W].
            k: at most this many of each; N if there are fewer.

        Returns:
            For each query (rows, scores) of its candidates, from the largest score to the smallest, then by row:
            the first k and the last k are the answer.
        """
        count = min(len(self.factors), max(2 * k, k + EXTRA_CANDIDATES))
        together = max(1, DECODED_BYTES // (2 * count * queries.shape[1] * 4))
        parts = [queries[start : start + together] for start in range(0, len(queries), together)]
        return [answer for part in parts for answer in self._search_part(part, count)]

    def _search_part(self, queries: np.ndarray, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        both = np.ascontiguousarray(np.concatenate([queries, -queries]))
        found = self._faiss.search(both, count)[1].reshape(2, len(queries), count)  # row numbers
        rows, places = np.unique(found, return_inverse=True)
        scores = inner_products(queries, self.rows(rows))
        places = places.reshape(found.shape)
        return [self._ranked(rows, scores[query], np.unique(places[:, query])) for query in range(len(queries))]

    def exact_search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Scores of the k best rows of each query by reading every code: the oracle of `search`; [M, k]."""
        best = np.full((len(queries), 0), 0, np.float32)
        for rows in self.blocks():
            best = np.concatenate([best, queries @ rows.T], axis=1)
            best = -np.sort(-best, axis=1)[:, :k]
        return best

    def _ranked(self, rows: np.ndarray, scores: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        order = own[np.lexsort((rows[own], -scores[own]))]
        return rows[order], scores[order]

    def _scale(self) -> float:
        """What rows are multiplied by: FAISS takes a row of norm below 3e-4 for zero, and float16 ends at 65,504."""
        live = self.norms[self.norms > 0]
        if not len(live):
            return 1.0
        largest = float(live.max())
        return 1 / max(float(live.min()), largest / 1e15) if self._bits == 1 else 1 / largest

    def _extremes(self, scale: float) -> np.ndarray:
        """The least and the largest of each coordinate, [2, W]: all that a scalar quantizer learns from training."""
        low = high = np.zeros(self._generation.plan.width, np.float32)
        if self._bits in (2, 4, 8):
            for rows in self.blocks():
                low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
        return np.stack([low, high]) * np.float32(scale)


def inner_products(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Scores [M, n], float32, summed in float64: equal rows have equal scores, whatever else is in the batch."""
    return (queries.astype(np.float64) @ rows.astype(np.float64).T).astype(np.float32)


def import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "searching needs FAISS: install one of loopsway[cpu] (faiss-cpu) and loopsway[gpu] (faiss-gpu), never both"
        ) from error
    return faiss


def _new_index(faiss: Any, width: int, bits: int) -> Any:
    metric = faiss.METRIC_INNER_PRODUCT
    if bits == 1:
        index = faiss.IndexRaBitQ(width, metric)
        index.qb = QUERY_BITS
        return index
    if bits == 32:
        return faiss.IndexFlat(width, metric)
    kind = faiss.ScalarQuantizer.QT_fp16 if bits == 16 else faiss.ScalarQuantizer.QT_8bit
    return faiss.IndexScalarQuantizer(width, kind, metric)


def open_slots(generation: Generation) -> dict[int | None, Slot]:
    """The slots of a generation, by step, the total under None; their FAISS indices are not loaded yet."""
    arrays = {name: generation.array(name) for name in ("step_factors", "step_norms", "total_factors", "total_norms")}
    slots: dict[int | None, Slot] = {
        None: Slot(generation, None, factors=arrays["total_factors"], norms=arrays["total_norms"])
    }
    for step in range(generation.plan.num_steps):
        slots[step] = Slot(generation, step, factors=arrays["step_factors"][step], norms=arrays["step_norms"][step])
    return slots
