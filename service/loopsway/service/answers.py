"""What the engine answers.

Q queries, n examples, S steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from loopsway.indexer import Ranking

from .queries import ResolvedQuery


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """The influence of some examples on one query at every step; arrays float32 [n, S]."""

    example_ids: Sequence[str]
    influences: NDArray[np.float32]
    standard_errors: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Influences:
    """One query's answer: what it was resolved to, its rankings, and the curves of those in them if asked for."""

    query: ResolvedQuery
    ranking: Ranking
    curves: Curves | None = None

    @property
    def num_influencers(self) -> int:
        """In all the rankings together."""
        rankings = (self.ranking.total, *self.ranking.steps)
        return sum(len(each.proponents.rows) + len(each.opponents.rows) for each in rankings)

    @property
    def example_ids(self) -> tuple[str, ...]:
        """Of all in the rankings, each once."""
        rankings = (self.ranking.total, *self.ranking.steps)
        sides = (side for each in rankings for side in (each.proponents, each.opponents))
        return tuple(dict.fromkeys(example_id for side in sides for example_id in side.example_ids))

    def cut(self, num_proponents: int, num_opponents: int) -> Influences:
        """With so many of each sign in each ranking, at the most."""
        total, *steps = (
            replace(
                each, proponents=each.proponents.first(num_proponents), opponents=each.opponents.first(num_opponents)
            )
            for each in (self.ranking.total, *self.ranking.steps)
        )
        return replace(self, ranking=replace(self.ranking, total=total, steps=tuple(steps)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectories:
    """The answer for all queries of one request.

    Attributes:
        steps: S of them, those of the last dimension.
        influences: float32 [Q, n, S], or [Q, n, S_train, S] for "step_matrix".
        standard_errors: the same shape.
    """

    queries: Sequence[ResolvedQuery]
    steps: Sequence[int]
    influences: NDArray[np.float32]
    standard_errors: NDArray[np.float32]
