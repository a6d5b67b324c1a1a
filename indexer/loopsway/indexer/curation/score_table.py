"""Scores as tables: a row for each query, step and example, the strongest proponents first.

query           id of the query; only where each query is scored on its own
step            of the query or the training example, as it is resolved; null: the total
id              of the training example
rank            1 for the largest influence, then 2; equal ones by their place in the index
influence       float32
standard_error  float32, of the sketch and its coding
significant     whether the influence lies beyond two standard errors of zero
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from ..search.ranking import Scores, is_significant


@dataclass(frozen=True, kw_only=True)
class Fractions:
    """Which part of each ranking is kept: all where both are None.

    Attributes:
        top: the largest influences, a share of the examples from 0 to 1; rounded up.
        bottom: the smallest.
    """

    top: float | None = None
    bottom: float | None = None

    def __post_init__(self) -> None:
        for name in ("top", "bottom"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} is {share}, expected a share of the examples, above 0 and at most 1")

    def ranks(self, count: int) -> np.ndarray:
        """Ranks that are kept of `count`, from 0, ascending."""
        first, last = self._ends(count)
        return np.union1d(np.arange(first), np.arange(count - last, count))

    def places(self, values: np.ndarray) -> np.ndarray:
        """Places of the values that are kept, in the order of their ranks: the largest first, equal ones by place."""
        first, last = self._ends(len(values))
        if first + last >= len(values):
            return np.argsort(-values, kind="stable")[self.ranks(len(values))]
        return np.concatenate([_largest(values, first), len(values) - 1 - _largest(-values[::-1], last)[::-1]])

    def _ends(self, count: int) -> tuple[int, int]:
        """How many are kept of the largest, and of the smallest."""
        if self.top is None and self.bottom is None:
            return count, 0
        top, bottom = (0 if share is None else math.ceil(share * count) for share in (self.top, self.bottom))
        return top, bottom


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest, in their order; equal ones by place."""
    if not count:
        return np.empty(0, np.int64)
    least = np.partition(values, -count)[-count]
    above, equal = np.flatnonzero(values > least), np.flatnonzero(values == least)
    return np.concatenate([above[np.argsort(-values[above], kind="stable")], equal[: count - len(above)]])


def score_table(scores: Scores, ids: Any, fractions: Fractions, queries: Sequence[str] | None = None) -> pa.Table:
    """The table of some queries' scores.

    Args:
        scores: of Q queries.
        ids: of all the index's rows, an arrow array.
        fractions: of each ranking that are kept.
        queries: their ids; None: there is one, and no column for it.
    """
    ranks = fractions.ranks(len(scores.rows))
    parts = [
        _ranked(scores, query, place, fractions)
        for query in range(len(scores.influences))
        for place in range(len(scores.steps))
    ]
    rows, influences, errors = (np.concatenate(values) for values in zip(*parts, strict=True))
    each, count = len(ranks), len(scores.influences)
    places = np.tile(np.repeat(np.arange(len(scores.steps)), each), count)
    table = {
        "step": pa.array(scores.steps, pa.int32()).take(pa.array(places)),
        "id": ids.take(pa.array(rows)),
        "rank": np.tile(ranks + 1, len(parts)).astype(np.int32),
        "influence": influences,
        "standard_error": errors,
        "significant": is_significant(influences, errors),
    }
    if queries is not None:
        whose = np.repeat(np.arange(count), each * len(scores.steps))
        table = {"query": pa.array(queries, pa.string()).take(pa.array(whose)), **table}
    return pa.table(table)


def _ranked(scores: Scores, query: int, place: int, fractions: Fractions) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    influences, errors = scores.influences[query, place], scores.standard_errors[query, place]
    chosen = fractions.places(influences)  # rows ascend: equal ones come by row
    return scores.rows[chosen], influences[chosen], errors[chosen]
