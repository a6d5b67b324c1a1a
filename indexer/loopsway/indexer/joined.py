"""One slot of an index over all its parts: rows are numbered through, deleted ones included.

N rows, M queries, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from .search import Slot


class JoinedSlot:
    """The slots of one step, or of the total, of each part.

    Args:
        slots: in the parts' order.
    """

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._slots = list(slots)
        self._starts = np.cumsum([0, *(len(slot.factors) for slot in slots)])

    @cached_property
    def norms(self) -> np.ndarray:
        """[N] of the sketches."""
        return np.concatenate([slot.norms for slot in self._slots])

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """Decoded rows, float32 [n, W]."""
        if len(self._slots) == 1:
            return self._slots[0].rows(rows)
        parts = np.searchsorted(self._starts, rows, side="right") - 1
        decoded = [slot.rows(rows[parts == part] - self._starts[part]) for part, slot in enumerate(self._slots)]
        out = np.empty((len(rows), decoded[0].shape[1]), np.float32)
        for part, values in enumerate(decoded):
            out[parts == part] = values
        return out

    def search(self, queries: np.ndarray, k: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `Slot.search`, over all parts."""
        found = [slot.search(queries, k) for slot in self._slots]
        if len(found) == 1:
            return found[0]
        return [self._merged([answers[query] for answers in found]) for query in range(len(queries))]

    def _merged(self, answers: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
        starts = self._starts[:-1]
        rows = np.concatenate([rows + start for (rows, _), start in zip(answers, starts, strict=True)])
        scores = np.concatenate([scores for _, scores in answers])
        order = np.lexsort((rows, -scores))
        return rows[order], scores[order]
