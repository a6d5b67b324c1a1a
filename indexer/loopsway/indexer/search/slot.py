"""Top-k search over the stored rows of one slot: a scan finds candidates, the codes themselves decide.

N rows, R of them that are read, M queries, W width, k results of each sign.

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
from .products import ExactProducts
from .scan import Rows, Score, in_shares, in_threads, ranked, scan, scored
from .shards import DecodedRows, Shards

SCAN_QUERIES = 64  # in one pass over the codes
SCORED_BYTES = 16 << 20  # of codes that are copied out at once to score their rows
EXACT_COST = 6  # times what reading a row of sign bits for an estimate takes


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
        within: the only rows that `search` and `scores` read, R whole blocks; None: all. Rows keep their numbers.

    Attributes:
        step: its number; None is the total.
        factors: float32 [N].
        norms: float32 [N].
        within: the rows that `search` and `scores` read.
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
        within: range | None = None,
    ) -> None:
        self.step, self.factors, self.norms = step, factors, norms
        self.within = range(len(factors)) if within is None else within
        self._generation, self._bits = generation, generation.plan.config.bits
        self._shards = Shards(generation, step, norms=norms, files=files, factory=factory)
        self._kept: np.ndarray | None = None
        if deleted is not None and len(deleted):
            kept = np.ones(len(factors), bool)
            kept[deleted] = False
            self._kept = kept[self._own]
        self._device_scan = device_scan

    @property
    def _row_bytes(self) -> int:
        return row_bytes(self._generation.plan.width, self._bits)

    @property
    def _own(self) -> slice:
        return slice(self.within.start, self.within.stop)

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
        for block in plan.blocks_of(rows):
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
            k: at most this many of each; fewer if there are no more.
            kept: bool [R], rows that may be found beside the deleted ones, which never are; None: all.
            effort: of an approximate search (shards.py) of all rows, unless too few are kept; None: every code is read.

        Returns:
            For each query (rows, scores) of its candidates, from the largest score to the smallest, then by row. The
            answer is among them: the first k, and the last k but for rows that score as the k-th last does, of which
            the first count; as far as these are proponents and opponents.
        """
        if kept is not None and self._kept is not None:
            kept = kept & self._kept
        kept = self._kept if kept is None else kept
        if not self.within or (kept is not None and not kept.any()):
            return [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        if effort is not None and self._shards.can_search_within(kept):
            candidates = self._shards.candidates(queries, k, effort=effort, kept=kept)
            scores = scored(self._scores_of(queries), list(enumerate(candidates)))
            return [ranked(*each) for each in zip(candidates, scores, strict=True)]
        parts = (queries[start : start + SCAN_QUERIES] for start in range(0, len(queries), SCAN_QUERIES))
        return [answer for part in parts for answer in self._scanned(part, k, kept)]

    def _scanned(self, queries: np.ndarray, k: int, kept: np.ndarray | None) -> list[tuple[np.ndarray, np.ndarray]]:
        rows, first = self._rows_to_scan(kept), self.within.start
        score = self._scores_of(queries, first)
        if self._device_scan is None:
            found = scan(queries, self._bits, rows, k, score)
        else:
            name = (self._generation.folder.address, self.step)
            found = self._device_scan.scan(name, queries, self._bits, rows, k, score)
        return [(places + first, scores) for places, scores in found]

    def _scores_of(self, queries: np.ndarray, first: int = 0) -> Score:
        """Scores rows that are numbered from `first` on, with queries [M, W] by their numbers."""
        products, size = ExactProducts(queries, self._bits), self._row_bytes
        at_once = max(1, SCORED_BYTES // size)

        def score(whose: np.ndarray, rows: np.ndarray) -> np.ndarray:
            rows, scores = rows + first, np.empty(len(rows))

            def fill(own: slice) -> None:
                scores[own] = products.of_own(self.codes(rows[own]), whose[own]) * self.factors[rows[own]]

            for start in range(0, len(rows), at_once):
                in_shares(fill, start, min(start + at_once, len(rows)), size=EXACT_COST * size * len(rows))
            return scores

        return score

    def _rows_to_scan(self, kept: np.ndarray | None) -> Rows:
        """Numbered from the first that may be read."""
        first, blocks = self.within.start, self._blocks
        rows_of = self._generation.plan.rows_of
        return Rows(
            blocks=[range(rows_of(block).start - first, rows_of(block).stop - first) for block in blocks],
            codes=lambda block: self._generation.mapped_codes(self.step, blocks[block]),
            factors=self.factors[self._own],
            longest=self._longest,
            row_bytes=self._row_bytes,
            kept=kept,
        )

    @property
    def _blocks(self) -> range:
        """Numbers of those that may be read."""
        return self._generation.plan.blocks_of(self.within)

    @cached_property
    def _longest(self) -> float:
        """Length of the longest row of codes."""
        if self._bits == 1:
            return math.sqrt(self._generation.plan.width)
        factors, norms = self.factors[self._own], self.norms[self._own]
        live = factors > 0
        lengths = norms[live] / factors[live]  # but for what coding took from the row
        return float(lengths.max(initial=0)) * math.sqrt(variance_factor(self._bits))

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """Estimated inner products of rows with rotated queries [M, W]; float32 [M, R], as `search` scores them."""
        plan, products = self._generation.plan, ExactProducts(queries, self._bits)
        out = np.empty((len(queries), len(self.within)), np.float32)

        def fill(block: int) -> None:
            own, first = plan.rows_of(block), self.within.start
            codes = self._generation.mapped_codes(self.step, block)
            out[:, own.start - first : own.stop - first] = products.of_all(codes).T * self.factors[own.start : own.stop]

        in_threads(fill, self._blocks)
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
    within: range | None = None,
) -> dict[int | None, Slot]:
    """The slots of a generation, by step, the total under None; their FAISS indices are not loaded yet.

    Args:
        generation: with all blocks and the row table written.
        files: facts of the generation's files, by name.
        deleted: rows that no search finds.
        device_scan: of exact searches; None: they run on the processor.
        factory: of the FAISS indices that they build.
        within: as `Slot`.
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
            within=within,
        )
        for step, factors, norms in zip(steps, table.factors, table.norms, strict=True)
    }
