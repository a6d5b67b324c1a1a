"""Reads the codes of a range of an index's rows in this process.

N rows of the index, R of the range, M queries, W width, L stored values of a row.

Rows have the index's numbers. What a whole reading finds is of the range; any row of the index can be looked up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..store.generation import Generation
from ..store.manifest import Manifest
from .device_scan import DeviceScan
from .joined import JoinedSlot
from .nearest import Compared, GoOn, Near, Others, compared, nearest
from .scan import Answer
from .slot import open_slots

SEVERAL = 3  # queries
Efforts = Mapping[int | None, Sequence[int]]  # of each slot's FAISS indices, part by part


class CodeReader:
    """The codes, factors and norms of an index.

    Args:
        manifest: of the index.
        stored: its parts.
        is_deleted: bool [N].
        device_scan: reads the codes in exact searches; None: the processor does.
        rows: the range, whole blocks (`Manifest.blocks`); None: all.
    """

    def __init__(
        self,
        manifest: Manifest,
        stored: Sequence[Generation],
        is_deleted: np.ndarray,
        device_scan: DeviceScan | None = None,
        rows: range | None = None,
    ) -> None:
        self.rows = range(manifest.num_rows) if rows is None else rows
        self._stored, self._plan = stored, manifest.plan
        self._blocks = [each for each in manifest.blocks() if self.rows.start <= each.start < self.rows.stop]
        self._within = [_own(self.rows, own) for own in manifest.part_rows()]
        parts = [
            open_slots(
                each,
                part.own_files,
                np.flatnonzero(is_deleted[own.start : own.stop]),
                device_scan,
                within=within,
            )
            for part, each, own, within in zip(manifest.parts, stored, manifest.part_rows(), self._within, strict=True)
        ]
        self._slots = {step: JoinedSlot([slots[step] for slots in parts]) for step in parts[0]}

    def warm_up(self) -> None:
        """Maps the codes of the range and asks the system to read them, or fetches them; compiles what searches run."""
        for stored, within in zip(self._stored, self._within, strict=True):
            stored.read_ahead(within)
        noise = np.random.default_rng(0).standard_normal((SEVERAL, self._plan.width)).astype(np.float32)
        for count in (1, SEVERAL):  # one query meets some codes in another way than several do
            self.search({None: noise[:count]}, 1, None, kept=None)

    def search(
        self, asked: Mapping[int | None, np.ndarray], k: int, efforts: Efforts | None, *, kept: np.ndarray | None
    ) -> dict[int | None, list[Answer]]:
        """Candidates of each slot's rotated queries [M, W], as `Slot.search`; one scan for a slot.

        Args:
            asked: queries by slot; None: the total.
            k: results of each sign.
            efforts: of an approximate search; None: every code is read.
            kept: bool [R], rows that may be found; None: all.
        """
        return {
            slot: self._slots[slot].search(queries, k, kept=kept, efforts=None if efforts is None else efforts[slot])
            for slot, queries in asked.items()
        }

    def scores(self, slot: int | None, queries: np.ndarray) -> np.ndarray:
        """Of every row with rotated queries [M, W], float32 [M, R], as `search` scores them."""
        return self._slots[slot].scores(queries)

    def nearest(self, slot: int | None, asked: Compared, *, kept: np.ndarray, go_on: GoOn | None = None) -> list[Near]:
        """The rows most like some rows.

        Args:
            slot: whose codes are compared.
            asked: the rows, of any range.
            kept: bool [R], rows that may be found.
            go_on: called before each block, in any thread. What it raises ends the comparison.
        """
        return nearest(asked, self._others(slot), kept, self._plan.width, go_on)

    def compared(self, slot: int | None, rows: np.ndarray) -> np.ndarray:
        """Agreements of these rows' codes with those of the range, float32 [n, R]."""
        return compared(self.codes(slot, rows), self.norms_of(slot, rows), self._others(slot))

    def codes(self, slot: int | None, rows: np.ndarray) -> np.ndarray:
        """Codes of these rows, of any range, [n, L]."""
        return self._slots[slot].codes(rows)

    def decoded(self, slot: int | None, rows: np.ndarray) -> np.ndarray:
        """What these rows' codes stand for, rotated, float32 [n, W]."""
        return self._slots[slot].rows(rows)

    def norms(self, slot: int | None) -> np.ndarray:
        """Of all the index's rows, float32 [N]."""
        return self._slots[slot].norms

    def norms_of(self, slot: int | None, rows: np.ndarray) -> np.ndarray:
        """Of these rows, float32 [n]."""
        return self._slots[slot].norms_of(rows)

    def _others(self, slot: int | None) -> Others:
        return Others(
            blocks=self._blocks,
            codes=lambda block: self.codes(slot, np.arange(block.start, block.stop)),
            norms=self.norms(slot)[self.rows.start : self.rows.stop],
            bits=self._plan.config.bits,
        )


def _own(rows: range, part: range) -> range:
    """Those of a part's rows that are in a range, by their numbers in the part."""
    start = max(rows.start, part.start) - part.start
    return range(start, max(start, min(rows.stop, part.stop) - part.start))
