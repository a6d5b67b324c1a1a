"""What a search answers, and which stored slot meets which of a query's sketches under each way to resolve.

S steps, W width, n results.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np

from ..config import Resolve

SIGNIFICANT = 2.0  # standard errors
TOTAL = -1  # the query's sketch summed over its steps, as the last row beside them


@dataclass(frozen=True, kw_only=True)
class Example:
    """An indexed example as its task named it.

    Attributes:
        id: unique in the index.
        description: one line for people.
        metadata: the task's columns.
    """

    id: str
    description: str
    metadata: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranked:
    """Examples by the size of their influence, the strongest first; equal ones by row.

    Attributes:
        example_ids: n of them.
        rows: int64 [n], their rows in the index.
        influences: float32 [n].
        standard_errors: float32 [n], of the sketch and its coding.
    """

    example_ids: tuple[str, ...]
    rows: np.ndarray
    influences: np.ndarray
    standard_errors: np.ndarray

    @property
    def significant(self) -> np.ndarray:
        """Bool [n]: whether the influence lies beyond two standard errors of zero."""
        return is_significant(self.influences, self.standard_errors)

    def first(self, count: int) -> Ranked:
        """The strongest of them."""
        return Ranked(
            example_ids=self.example_ids[:count],
            rows=self.rows[:count],
            influences=self.influences[:count],
            standard_errors=self.standard_errors[:count],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Influencers:
    """The strongest examples at one step, or in the total.

    Attributes:
        step: of the query (QUERY_STEP, SAME_STEP) or of the training examples (TRAIN_STEP); None: the total.
        proponents: influence > 0: a training step on them lowers the query's loss.
        opponents: influence < 0.
    """

    step: int | None
    proponents: Ranked
    opponents: Ranked


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranking:
    """The answer to one query: TracIn over all steps, and each step.

    Attributes:
        total: of all steps together.
        steps: one by one.
        recall: 1 when every code was read: the answer is the exact top k of them. Else the least recall@10 that the
            build measured, without a filter, of the steps that were asked.
        coverage: shards that answered, of those that were asked; 1 in one process. Below 1, it is the answer without
            the examples of those that did not.
    """

    total: Influencers
    steps: tuple[Influencers, ...]
    recall: float = 1.0
    coverage: float = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Every example's influence on each of Q queries.

    Attributes:
        rows: int64 [n], of the examples in the index.
        steps: S + 1 of them: None, the total, and then those asked for, as in `Influencers`.
        influences: float32 [Q, S + 1, n].
        standard_errors: float32 [Q, S + 1, n].
        coverage: as in `Ranking`.
    """

    rows: np.ndarray
    steps: tuple[int | None, ...]
    influences: np.ndarray
    standard_errors: np.ndarray
    coverage: float = 1.0


class Pair(NamedTuple):
    """An influence is the inner product of a stored slot (None: the total) and a query sketch (TOTAL: the sum)."""

    slot: int | None
    query: int


def pairs(resolve: Resolve, num_steps: int, query_steps: int) -> list[Pair]:
    """The pair behind each step's influence.

    Args:
        resolve: how influences are split over steps.
        num_steps: of the index.
        query_steps: of the query.

    Raises:
        ValueError: resolve is unknown, or SAME_STEP with two different numbers of steps.
    """
    match resolve:
        case "query_step":
            return [Pair(None, step) for step in range(query_steps)]
        case "train_step":
            return [Pair(step, TOTAL) for step in range(num_steps)]
        case "same_step":
            if num_steps != query_steps:
                raise ValueError(
                    f"same_step compares equal steps, but the index has {num_steps} and the query {query_steps}; use "
                    "query_step or train_step, or run the query with the index's number"
                )
            return [Pair(step, step) for step in range(num_steps)]
        case _:
            raise ValueError(f"resolve is {resolve!r}, expected one of {', '.join(get_args(Resolve))}")


def is_significant(influences: np.ndarray, standard_errors: np.ndarray) -> np.ndarray:
    """Whether each influence lies beyond two of its standard errors of zero."""
    return np.abs(influences) > SIGNIFICANT * standard_errors


def slot_name(slot: int | None) -> str:
    """Of a stored slot, in recall.json."""
    return "total" if slot is None else str(slot)
