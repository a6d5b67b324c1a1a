"""Top-k search over the stored rows of one slot: a scan finds candidates, the codes themselves decide.

N rows, M queries, W width, k results of each sign.

By default every code is read (scan.py, or device_scan.py). The FAISS indices of a slot, for other tools and for
approximate search, hold the decoded rows, all multiplied by one number: sign bits in IndexRaBitQ for 1-bit codes (whose
scores then equal a reading of the codes), a scalar quantizer or flat vectors for the others. Whatever finds candidates,
they are scored again with the codes and the float32 query. A slot has a FAISS index, and a file, for each *shard* of
its rows, so that building one takes bounded memory.

This is the only file that imports faiss.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..sketches.coding import decode, row_bytes, variance_factor
from ..store.folders import FileFacts, IndexDamagedError
from ..store.generation import Generation
from ..store.row_table import open_row_table
from .device_scan import DeviceScan
from .products import exact_products
from .scan import Rows, Scored, in_threads, ranked, scan

FAISS_FOLDER = "faiss"
QUERY_BITS = 8  # of a query in RaBitQ's scan; 8 lose nothing measurable before scoring again
EXTRA_CANDIDATES = 32  # of FAISS's
SCAN_QUERIES = 64  # in one pass over the codes
SCORED_BYTES = 16 << 20  # of codes that are copied out at once to score their rows
SHARD_BYTES, MOST_SHARDS = 32 << 20, 64  # a shard has at least so many bytes of codes, a slot at most so many shards


class Slot:
    """One step of a generation, or its total.

    Args:
        generation: the stored rows.
        step: its number; None is the total over steps.
        factors: [N] of the codes.
        norms: [N] of the sketches.
        files: facts of the generation's files, by name; its FAISS indices are opened when they are needed.
        deleted: rows that no search finds.
        device_scan: reads the codes in an exact search; None: the processor does.
    """

    def __init__(
        self,
        generation: Generation,
        step: int | None,
        *,
        factors: np.ndarray,
        norms: np.ndarray,
        files: Mapping[str, FileFacts],
        deleted: np.ndarray | None = None,
        device_scan: DeviceScan | None = None,
    ) -> None:
        self.step, self.factors, self.norms = step, factors, norms
        self._generation, self._bits = generation, generation.plan.config.bits
        self._shards = generation.plan.shards()
        self._kept: np.ndarray | None = None
        if deleted is not None and len(deleted):
            self._kept = np.ones(len(factors), bool)
            self._kept[deleted] = False
        self._device_scan = device_scan
        self._files = files
        self._faiss: list[Any] = []
        self._loading = threading.Lock()

    def file_name(self, shard: int) -> str:
        """Of its FAISS index, within the generation's folder."""
        step = "total" if self.step is None else f"step-{self.step:04d}"
        return f"{FAISS_FOLDER}/{step}-{shard:02d}.faiss"

    def codes(self, rows: np.ndarray) -> np.ndarray:
        """Codes of these rows, [n, L]."""
        return self._generation.codes(self.step, rows)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Decoded rows, float32 [n, W]."""
        return decode(self.codes(rows), self.factors[rows], self._bits)

    def blocks(self, rows: range | None = None) -> Iterator[np.ndarray]:
        """All decoded rows in order, or those of one shard, a block at a time, float32 [n, W]."""
        plan = self._generation.plan
        rows = range(plan.num_examples) if rows is None else rows
        for block in range(rows.start // plan.block_rows, -(-rows.stop // plan.block_rows)):
            own = plan.rows_of(block)
            factors = self.factors[own.start : own.stop]
            yield decode(self._generation.block_codes(self.step, block), factors, self._bits)

    def build(self) -> dict[str, FileFacts]:
        """Makes the slot's FAISS indices, one after another, and writes the files that it uses from now on.

        Returns:
            Their facts, by name.
        """
        faiss, scale = import_faiss(), self._scale()
        written = {}
        for shard, rows in enumerate(self._shards):
            index = _new_index(faiss, self._generation.plan.width, self._bits)
            index.train(self._extremes(rows, scale))
            for block in self.blocks(rows):
                index.add(block * np.float32(scale))
            write = partial(_write_index, faiss, index)
            written[self.file_name(shard)] = self._generation.folder.write_file(self.file_name(shard), write)
        self._files, self._faiss = written, []
        return written

    def unload(self) -> None:
        """Frees the FAISS indices."""
        self._faiss = []

    def _opened(self) -> list[Any]:
        """The slot's FAISS indices, memory-mapped where FAISS can."""
        with self._loading:
            if not self._faiss:
                shards = enumerate(self._shards)
                self._faiss = [self._loaded(self.file_name(shard), len(rows)) for shard, rows in shards]
            return self._faiss

    def _loaded(self, name: str, num_rows: int) -> Any:
        faiss, folder = import_faiss(), self._generation.folder
        with folder.local(name, lambda: self._files[name]["digest"]) as file:
            try:
                index = faiss.read_index(str(file), faiss.IO_FLAG_MMAP_IFC)
            except RuntimeError as error:
                raise IndexDamagedError(f"FAISS index {folder.at(name)} can't be read: {error}") from error
            folder.keep(file, index)
        expected, found = (num_rows, self._generation.plan.width), (index.ntotal, index.d)
        if found != expected:
            raise IndexDamagedError(f"FAISS index {folder.at(name)} has (rows, width) {found}, not {expected}")
        return index

    def search(
        self, queries: np.ndarray, k: int, *, kept: np.ndarray | None = None, exact: bool = True
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The k rows of largest and the k of smallest estimated inner product with each rotated query.

        Args:
            queries: float32 [M, W].
            k: at most this many of each; N if there are fewer.
            kept: bool [N], rows that may be found beside the deleted ones, which never are; None: all.
            exact: whether every code is read; or FAISS's candidates are taken.

        Returns:
            For each query (rows, scores) of its candidates, from the largest score to the smallest, then by row. The
            answer is among them: the first k, and the last k but for rows that score as the k-th last does, of which
            the first count; as far as these are proponents and opponents.
        """
        if kept is not None and self._kept is not None:
            kept = kept & self._kept
        kept = self._kept if kept is None else kept
        if kept is not None and not kept.any():
            return [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        search = self._scanned if exact else self._found_by_faiss
        parts = (queries[start : start + SCAN_QUERIES] for start in range(0, len(queries), SCAN_QUERIES))
        return [answer for part in parts for answer in search(part, k, kept)]

    def _scanned(self, queries: np.ndarray, k: int, kept: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]]:
        rows = self._rows_to_scan(kept)
        if self._device_scan is None:
            return scan(queries, self._bits, rows, k, self._scored)
        name = (self._generation.folder.address, self.step)
        return self._device_scan.scan(name, queries, self._bits, rows, k, self._scored)

    def _scored(self, query: np.ndarray) -> Scored:
        """Gives the scores, float64 [n], of rows."""
        products = exact_products(query[None], self._bits)
        at_once = max(1, SCORED_BYTES // row_bytes(self._generation.plan.width, self._bits))

        def scored(rows: np.ndarray) -> np.ndarray:
            parts = np.split(rows, range(at_once, len(rows), at_once))
            return np.concatenate([products(self.codes(part))[:, 0] for part in parts]) * self.factors[rows]

        return scored

    def _rows_to_scan(self, kept: np.ndarray | None) -> Rows:
        plan = self._generation.plan
        return Rows(
            blocks=[plan.rows_of(block) for block in range(plan.num_blocks)],
            codes=lambda block: self._generation.mapped_codes(self.step, block),
            factors=self.factors,
            longest=self._longest,
            kept=kept,
        )

    @cached_property
    def _longest(self) -> float:
        """Length of the longest row of codes."""
        if self._bits == 1:
            return math.sqrt(self._generation.plan.width)
        live = self.factors > 0
        lengths = self.norms[live] / self.factors[live]  # but for what coding took from the row
        return float(lengths.max(initial=0)) * math.sqrt(variance_factor(self._bits))

    def _found_by_faiss(
        self, queries: np.ndarray, k: int, kept: np.ndarray | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        both = np.ascontiguousarray(np.concatenate([queries, -queries]))
        count = max(2 * k, k + EXTRA_CANDIDATES)
        shards = range(len(self._shards))
        found = np.concatenate([self._candidates(shard, both, count, kept) for shard in shards], axis=1)
        pairs = zip(found[: len(queries)], found[len(queries) :], queries, strict=True)
        return [self._ranked((np.union1d(mine, others), query)) for mine, others, query in pairs]

    def _candidates(self, shard: int, queries: np.ndarray, count: int, kept: np.ndarray | None) -> np.ndarray:
        """Rows of a shard that score highest, as FAISS sees it: int64 [M, n], with n = count or all that are there."""
        rows = self._shards[shard]
        own = None if kept is None else kept[rows.start : rows.stop]
        count = min(count, len(rows) if own is None else int(own.sum()))
        if not count:
            return np.empty((len(queries), 0), np.int64)
        return self._opened()[shard].search(queries, count, params=self._parameters(own))[1] + rows.start

    def _parameters(self, kept: np.ndarray | None) -> Any:
        """Of a FAISS search, which passes over other rows as it goes; None if all are kept."""
        if kept is None:
            return None
        faiss = import_faiss()
        selector = faiss.IDSelectorBitmap(np.packbits(kept, bitorder="little"))
        if self._bits == 1:
            return faiss.RaBitQSearchParameters(sel=selector, qb=QUERY_BITS)
        return faiss.SearchParameters(sel=selector)

    def _ranked(self, asked: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of rows and a query: the rows and their scores, the largest first; equal ones by row."""
        rows, query = asked
        return ranked(rows, self._scored(query)(rows))

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Estimated inner products of all rows with rotated queries [M, W]; float32 [M, N], as `search` scores them."""
        plan, products = self._generation.plan, exact_products(queries, self._bits)
        out = np.empty((len(queries), plan.num_examples), np.float32)

        def fill(block: int) -> None:
            own = slice(plan.rows_of(block).start, plan.rows_of(block).stop)
            codes = self._generation.mapped_codes(self.step, block)
            out[:, own] = products(codes).T * self.factors[own]

        in_threads(fill, range(plan.num_blocks))
        return out

    def exact_search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Scores of the k best rows of each query by reading every code: the oracle of `search`; [M, k]."""
        best = np.full((len(queries), 0), 0, np.float32)
        for rows in self.blocks():
            best = np.concatenate([best, queries @ rows.T], axis=1)
            best = -np.sort(-best, axis=1)[:, :k]
        return best

    def _scale(self) -> float:
        """What rows are multiplied by: FAISS takes a row of norm below 3e-4 for zero, and float16 ends at 65,504."""
        live = self.norms[self.norms > 0]
        if not len(live):
            return 1.0
        largest = float(live.max())
        return 1 / max(float(live.min()), largest / 1e15) if self._bits == 1 else 1 / largest

    def _extremes(self, rows: range, scale: float) -> np.ndarray:
        """The least and the largest of each coordinate, [2, W]: all that a scalar quantizer learns from training."""
        low = high = np.zeros(self._generation.plan.width, np.float32)
        if self._bits in (2, 4, 8):
            for block in self.blocks(rows):
                low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
        return np.stack([low, high]) * np.float32(scale)


def shard_rows(num_examples: int, bytes_of_a_row: int, block_rows: int) -> int:
    """Rows of a shard for a new part: whole blocks."""
    least = max(SHARD_BYTES // bytes_of_a_row, -(-num_examples // MOST_SHARDS))
    return -(-least // block_rows) * block_rows


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


def _write_index(faiss: Any, index: Any, file: Path) -> None:
    faiss.write_index(index, str(file))


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


def open_slots(
    generation: Generation,
    files: Mapping[str, FileFacts],
    deleted: np.ndarray | None = None,
    device_scan: DeviceScan | None = None,
) -> dict[int | None, Slot]:
    """The slots of a generation, by step, the total under None; their FAISS indices are not loaded yet.

    Args:
        generation: with all blocks and the row table written.
        files: facts of the generation's files, by name.
        deleted: rows that no search finds.
        device_scan: of exact searches; None: they run on the processor.
    """
    table = open_row_table(generation, files)
    steps: list[int | None] = [*range(generation.plan.num_steps), None]
    return {
        step: Slot(
            generation, step, factors=factors, norms=norms, files=files, deleted=deleted, device_scan=device_scan
        )
        for step, factors, norms in zip(steps, table.factors, table.norms, strict=True)
    }
