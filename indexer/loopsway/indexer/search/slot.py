"""Top-k search over the stored rows of one slot: a scan finds candidates, the codes themselves decide.

N rows, M queries, W width, k results of each sign.

By default every code is read (scan.py, or device_scan.py); an approximate search takes candidates from FAISS indices
(shards.py). Whatever finds candidates, they are scored again with the codes and the float32 query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property

import numpy as np

from ..sketches.coding import decode, row_bytes, variance_factor
from ..store.folders import FileFacts
from ..store.generation import Generation
from ..store.row_table import open_row_table
from .device_scan import DeviceScan
from .products import exact_products
from .scan import Rows, Scored, in_threads, ranked, scan
from .shards import DecodedRows, Shards

SCAN_QUERIES = 64  # in one pass over the codes
SCORED_BYTES = 16 << 20  # of codes that are copied out at once to score their rows


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
        factory: of the FAISS indices that `build` makes.
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
        factory: str | None = None,
    ) -> None:
        self.step, self.factors, self.norms = step, factors, norms
        self._generation, self._bits = generation, generation.plan.config.bits
        self._shards = Shards(generation, step, norms=norms, files=files, factory=factory)
        self._kept: np.ndarray | None = None
        if deleted is not None and len(deleted):
            self._kept = np.ones(len(factors), bool)
            self._kept[deleted] = False
        self._device_scan = device_scan

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
        """Makes the slot's FAISS indices, and writes the files that it uses from now on.

        Returns:
            Their facts, by name.

        Raises:
            ValueError: FAISS can't be trained on these rows.
        """
        return self._shards.build(DecodedRows(rows=self.rows, blocks=self.blocks))

    def unload(self) -> None:
        """Frees the FAISS indices."""
        self._shards.unload()

    def full_effort(self, k: int) -> int:
        """The effort at which an approximate search for k results does all that it can."""
        return self._shards.full_effort(k)

    def search(
        self, queries: np.ndarray, k: int, *, kept: np.ndarray | None = None, effort: int | None = None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The k rows of largest and the k of smallest estimated inner product with each rotated query.

        Args:
            queries: float32 [M, W].
            k: at most this many of each; N if there are fewer.
            kept: bool [N], rows that may be found beside the deleted ones, which never are; None: all.
            effort: of an approximate search (shards.py), unless too few rows are kept; None: every code is read.

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
        if effort is not None and self._shards.can_search_within(kept):
            candidates = self._shards.candidates(queries, k, effort=effort, kept=kept)
            return in_threads(self._ranked, zip(candidates, queries, strict=True))
        parts = (queries[start : start + SCAN_QUERIES] for start in range(0, len(queries), SCAN_QUERIES))
        return [answer for part in parts for answer in self._scanned(part, k, kept)]

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

    def _ranked(self, asked: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Of rows and a query: the rows and their scores, the largest first; equal ones by row."""
        rows, query = asked
        if not len(rows):  # where no cell that FAISS visited holds one that may be found
            return rows, np.empty(0, np.float32)
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


def inner_products(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Scores [M, n], float32, summed in float64: equal rows have equal scores, whatever else is in the batch."""
    return (queries.astype(np.float64) @ rows.astype(np.float64).T).astype(np.float32)


def open_slots(
    generation: Generation,
    files: Mapping[str, FileFacts],
    deleted: np.ndarray | None = None,
    device_scan: DeviceScan | None = None,
    *,
    factory: str | None = None,
) -> dict[int | None, Slot]:
    """The slots of a generation, by step, the total under None; their FAISS indices are not loaded yet.

    Args:
        generation: with all blocks and the row table written.
        files: facts of the generation's files, by name.
        deleted: rows that no search finds.
        device_scan: of exact searches; None: they run on the processor.
        factory: of the FAISS indices that they build.
    """
    table = open_row_table(generation, files)
    steps: list[int | None] = [*range(generation.plan.num_steps), None]
    return {
        step: Slot(
            generation,
            step,
            factors=factors,
            norms=norms,
            files=files,
            deleted=deleted,
            device_scan=device_scan,
            factory=factory,
        )
        for step, factors, norms in zip(steps, table.factors, table.norms, strict=True)
    }
