"""The training examples whose gradients are most like a training example's.

Both sides are stored codes (search/nearest.py): no model runs. The example itself is in no answer.

n neighbors of one example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np

from ..search.filters import matching_rows
from ..search.index import Index
from ..search.nearest import By, Compared, GoOn, Near

TOGETHER = 256  # examples that are compared with all others at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbors:
    """The examples most like one, the most alike first; equal ones by row.

    Attributes:
        example_ids: n of them.
        rows: int64 [n], their rows in the index.
        similarities: float32 [n].
        standard_errors: float32 [n], of the sketch and its coding.
        coverage: as in `Ranking`.
    """

    example_ids: tuple[str, ...]
    rows: np.ndarray
    similarities: np.ndarray
    standard_errors: np.ndarray
    coverage: float = 1.0


def find_neighbors(
    index: Index,
    example_ids: Sequence[str],
    k: int | None = 10,
    *,
    by: By = "cosine",
    step: int | None = None,
    threshold: float | None = None,
    where: str | None = None,
    deadline: float | None = None,
    go_on: GoOn | None = None,
) -> list[Neighbors]:
    """The training examples whose gradients are most like those of some.

    Args:
        index: open.
        example_ids: of indexed examples.
        k: at most so many for each; None, with a threshold: all.
        by: "cosine", or "inner_product", the influence of one on the other.
        step: of the loop; None: the gradients summed over steps.
        threshold: the least similarity.
        where: a filter over the examples, which the search is done within.
        deadline: as in `Index.search`.
        go_on: called before each costly part, a comparison with all of a block, in any thread, where this process reads
            the codes. What it raises ends the search.

    Raises:
        UnknownExampleError: an id is not in the index.
        ShardsUnavailableError: as `Index.search`.
        FilterError, ValueError: the filter, k, `by` or step.
    """
    if by not in get_args(By):
        raise ValueError(f"by is {by!r}, expected one of {', '.join(get_args(By))}")
    if k is None and threshold is None:
        raise ValueError("k and threshold are both None: give one, or every example is an answer")
    if k is not None and k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    check_step(index, step)
    rows = np.array([index.row_of(example_id) for example_id in example_ids], np.int64)
    may = np.zeros(index.num_rows, bool)
    may[index.sketched_rows()] = True
    if where is not None:
        may &= matching_rows(index.examples, where)
    found = []
    for start in range(0, len(rows), TOGETHER):
        own = rows[start : start + TOGETHER]
        codes, norms = index.codes.codes(step, own), index.codes.norms_of(step, own)
        asked = Compared(rows=own, codes=codes, norms=norms, by=by, k=k, threshold=threshold)
        near, coverage = index.reader.nearest(step, asked, kept=may, deadline=deadline, go_on=go_on)
        found += [_neighbors(index, each, coverage.share) for each in near]
    return found


def check_step(index: Index, step: int | None) -> None:
    """Raises ValueError where there is no such step; None stands for the total."""
    if step is not None and not 0 <= step < index.num_steps:
        raise ValueError(f"step {step} does not exist; expected 0 to {index.num_steps - 1}, or none for the total")


def _neighbors(index: Index, near: Near, coverage: float) -> Neighbors:
    return Neighbors(
        example_ids=tuple(index.ids_in(near.rows)),
        rows=near.rows,
        similarities=near.similarities,
        standard_errors=near.standard_errors,
        coverage=coverage,
    )
