"""What the engine asks of an index about resolved queries, in a thread of its own (search_threads.py).

Q queries, n examples, S steps, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loopsway.indexer import FilterError, Index, IndexDamagedError, Neighbors, Ranking, Scores, find_neighbors
from loopsway.indexer.config import Resolve
from loopsway.indexer.search.index import TrajectoryResolve
from loopsway.indexer.search.nearest import By

from .answers import Curves, Influences
from .errors import InvalidFieldError
from .queries import ResolvedQuery
from .search_threads import GoOn

# Memory that one GetTrajectories may take for decoded rows.
DECODED_BYTES = 256 << 20

Measured = tuple[NDArray[np.float32], NDArray[np.float32]]  # influences and standard errors


@dataclass(frozen=True, kw_only=True)
class RankingQuestion:
    """Which examples matter most; attributes as for `Index.search`."""

    k: int
    resolve: Resolve
    steps: Sequence[int] | None
    where: str | None
    exact: bool
    deadline: float | None

    def ask(self, index: Index, queries: Sequence[ResolvedQuery], go_on: GoOn) -> list[Ranking]:
        """The ranking of each query."""
        rankings: dict[int, Ranking] = {}
        for rows in _by_steps(queries):
            sketches = _stacked([queries[row] for row in rows])
            # Each field was checked before it came here: what is left is steps that the query doesn't have.
            with _refusing("steps" if self.steps else "resolve"):
                found = index.search(
                    sketches,
                    k=self.k,
                    resolve=self.resolve,
                    steps=self.steps,
                    where=self.where,
                    exact=self.exact,
                    go_on=go_on,
                    deadline=self.deadline,
                )
            rankings |= zip(rows, found, strict=True)
        return [rankings[row] for row in range(len(queries))]


@dataclass(frozen=True, kw_only=True)
class NeighborsQuestion:
    """Which examples are most like some examples; attributes as for `find_neighbors`."""

    example_ids: Sequence[str]
    k: int
    by: By
    step: int | None
    threshold: float | None
    where: str | None
    deadline: float | None

    def ask(self, index: Index, go_on: GoOn) -> list[Neighbors]:
        """The neighbors of each example."""
        with _refusing("step"):
            return find_neighbors(
                index,
                self.example_ids,
                self.k,
                by=self.by,
                step=self.step,
                threshold=self.threshold,
                where=self.where,
                deadline=self.deadline,
                go_on=go_on,
            )


def mean_scores(
    index: Index,
    queries: Sequence[ResolvedQuery],
    resolve: Resolve,
    steps: Sequence[int] | None,
    where: str | None,
    deadline: float | None,
    go_on: GoOn,
) -> Scores:
    """Influences of every example on the mean of the queries."""
    counts = sorted({query.num_steps for query in queries})
    if len(counts) > 1:
        raise InvalidFieldError(
            f"the queries have different numbers of steps, {counts}, and no mean; ask in separate requests",
            field="queries",
        )
    mean = np.mean([query.sketch for query in queries], axis=0, dtype=np.float64).astype(np.float32)
    with _refusing("steps" if steps else "resolve"):
        return index.scores(mean, resolve, steps, where=where, go_on=go_on, deadline=deadline)


def trajectories(
    index: Index,
    queries: Sequence[ResolvedQuery],
    example_ids: Sequence[str],
    resolve: TrajectoryResolve,
    steps: Sequence[int] | None,
    go_on: GoOn,
) -> Measured:
    """Influences of the examples on each query, step by step, [Q, n, ...]."""
    groups = _by_steps(queries)
    if len(groups) > 1 and resolve != "train_step" and steps is None:
        counts = sorted({query.num_steps for query in queries})
        raise InvalidFieldError(
            f"the queries have different numbers of steps, {counts}, which one tensor can't hold; name the steps, or "
            "ask for them in separate requests",
            field="queries",
        )
    results: dict[int, Measured] = {}
    for rows in groups:
        sketches = _stacked([queries[row] for row in rows])
        with _refusing("steps" if steps else "resolve"):
            influences, errors = _measured(index, sketches, example_ids, resolve, steps, go_on)
        results |= zip(rows, zip(influences, errors, strict=True), strict=True)
    ordered = [results[row] for row in range(len(queries))]
    return np.stack([influence for influence, _ in ordered]), np.stack([error for _, error in ordered])


def curves(index: Index, answer: Influences, num_steps: int, resolve: Resolve, go_on: GoOn) -> Curves:
    """Of all examples in the answer's rankings."""
    example_ids = answer.example_ids
    if example_ids:
        influences, errors = _measured(index, _stacked([answer.query]), example_ids, resolve, None, go_on)
    else:
        influences = errors = np.zeros((1, 0, num_steps), np.float32)
    return Curves(example_ids=example_ids, influences=influences[0], standard_errors=errors[0])


def _measured(
    index: Index,
    sketches: NDArray[np.float32],
    example_ids: Sequence[str],
    resolve: TrajectoryResolve,
    steps: Sequence[int] | None,
    go_on: GoOn,
) -> Measured:
    """A block of examples at a time: the index decodes all it is asked for."""
    slots = 1 if resolve == "query_step" else index.num_steps
    if steps is not None and resolve in ("train_step", "same_step"):
        slots = len(steps)
    size = max(1, DECODED_BYTES // (slots * index.width * 4))
    blocks = [example_ids[start : start + size] for start in range(0, len(example_ids), size)]
    measured = []
    for block in blocks:
        go_on()
        measured.append(index.trajectories_with_errors(sketches, block, resolve, steps))
    influences, errors = zip(*measured, strict=True)
    return np.concatenate(influences, axis=1), np.concatenate(errors, axis=1)


@contextmanager
def _refusing(field: str) -> Iterator[None]:
    """What the index refuses with a ValueError is the request's fault, unless the index itself is damaged."""
    try:
        yield
    except IndexDamagedError:
        raise
    except FilterError as error:
        raise InvalidFieldError(str(error), field="where") from error
    except ValueError as error:
        raise InvalidFieldError(str(error), field=field) from error


def _stacked(queries: Sequence[ResolvedQuery]) -> NDArray[np.float32]:
    """Sketches of queries with equal numbers of steps, [Q, S, W]; of one without a copy."""
    return queries[0].sketch[None] if len(queries) == 1 else np.stack([query.sketch for query in queries])


def _by_steps(queries: Sequence[ResolvedQuery]) -> list[list[int]]:
    """Positions of the queries, in groups of equal numbers of steps: one array can hold each."""
    groups: dict[int, list[int]] = {}
    for position, query in enumerate(queries):
        groups.setdefault(query.num_steps, []).append(position)
    return list(groups.values())
