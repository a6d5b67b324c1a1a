"""One slot of an index over all its parts: rows are numbered through, deleted ones included.

N rows, M queries, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .slot import Slot


class JoinedSlot:
    """The slots of one step, or of the total, of each part.

    Args:
        slots: in the parts' order.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = list(slots)
        self._starts = np.cumsum([0, *(len(slot.factors) for slot in slots)])

    @property
    def norms(self) -> np.ndarray:
        """[N] of the sketches."""
        return np.concatenate([slot.norms for slot in self._slots])

    def norms_of(self, rows: np.ndarray) -> np.ndarray:
        """Norms of the sketches in these rows, float32 [n]."""
        return self._gathered(rows, lambda slot, own: slot.norms[own])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Decoded rows, float32 [n, W]."""
        return self._gathered(rows, lambda slot, own: slot.rows(own))

    def codes(self, rows: np.ndarray) -> np.ndarray:
        """Codes of these rows, [n, L]."""
        return self._gathered(rows, lambda slot, own: slot.codes(own))

    def _gathered(self, rows: np.ndarray, read: Callable[[Slot, np.ndarray], np.ndarray]) -> np.ndarray:
        """What is read of rows, part by part, in their order."""
        if len(self._slots) == 1:
            return read(self._slots[0], rows)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        values = [read(slot, rows[parts == part] - self._starts[part]) for part, slot in enumerate(self._slots)]
        out = np.empty((len(rows), *values[0].shape[1:]), values[0].dtype)
        for part, own in enumerate(values):
            out[parts == part] = own
        return out

    def search(
        self,
        queries: np.ndarray,
        k: int,
        *,
        kept: np.ndarray | None = None,
        efforts: Sequence[int] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `Slot.search`, over all parts; each has its own effort. Of rows that are not read it tells nothing."""
        lengths = [len(slot.within) for slot in self._slots]
        own = [None] * len(self._slots) if kept is None else np.split(kept, np.cumsum(lengths)[:-1])
        each = [None] * len(self._slots) if efforts is None else efforts
        found = [
            slot.search(queries, k, kept=part, effort=effort)
            for slot, part, effort in zip(self._slots, own, each, strict=True)
        ]
        if len(found) == 1:
            return found[0]
        return [self._merged([answers[query] for answers in found]) for query in range(len(queries))]

    def scores(self, queries: np.ndarray) -> np.ndarray:
        """As `Slot.scores`, over all parts."""
        return np.concatenate([slot.scores(queries) for slot in self._slots], axis=1)

    def _merged(self, answers: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        starts = self._starts[:-1]
        rows = np.concatenate([rows + start for (rows, _), start in zip(answers, starts, strict=True)])
        scores = np.concatenate([scores for _, scores in answers])
        order = np.lexsort((rows, -scores))
        return rows[order], scores[order]
