"""The training examples whose gradients are most like a training example's.

Both sides are stored codes (similarity.py): no model runs. The example itself is in no answer.

n examples asked about, N of the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pyarrow as pa

from ..search.filters import matching_rows
from ..search.index import Index
from ..search.scan import in_threads
from .similarity import agreements, cosines

By = Literal["cosine", "inner_product"]

TOGETHER = 256  # examples that are compared with all others at once


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbors:
    """The examples most like one, the most alike first; equal ones by row.

    Attributes:
        example_ids: n of them.
        rows: int64 [n], their rows in the index.
        similarities: float32 [n].
        standard_errors: float32 [n], of the sketch and its coding.
    """

    example_ids: tuple[str, ...]
    rows: np.ndarray
    similarities: np.ndarray
    standard_errors: np.ndarray


def find_neighbors(
    index: Index,
    example_ids: Sequence[str],
    k: int | None = 10,
    *,
    by: By = "cosine",
    step: int | None = None,
    threshold: float | None = None,
    where: str | None = None,
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

    Raises:
        UnknownExampleError: an id is not in the index.
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
    may = index.sketched_rows()
    if where is not None:
        may = may[matching_rows(index.examples, where)[may]]
    found = []
    for start in range(0, len(rows), TOGETHER):
        own = rows[start : start + TOGETHER]
        similarity, errors = cosines(compared(index, step, own), index.bits, index.width)  # [n, N]
        if by == "inner_product":
            norms = index.norms(step)
            products = norms[own, None] * norms
            similarity, errors = similarity * products, errors * products
        found += [
            _best(index, may[may != row], near, error, k, threshold)
            for row, near, error in zip(own, similarity, errors, strict=True)
        ]
    return found


def check_step(index: Index, step: int | None) -> None:
    """Raises ValueError where there is no such step; None stands for the total."""
    if step is not None and not 0 <= step < index.num_steps:
        raise ValueError(f"step {step} does not exist; expected 0 to {index.num_steps - 1}, or none for the total")


def compared(index: Index, step: int | None, rows: np.ndarray) -> np.ndarray:
    """Agreements of these rows' codes with those of all, float32 [n, N]."""
    own, out = index.codes(step, rows), np.zeros((len(rows), index.num_rows), np.float32)
    norms = index.norms(step)

    def fill(block: range) -> None:
        out[:, block.start : block.stop] = agreements(
            index.codes(step, np.arange(block.start, block.stop)), own, index.bits
        ).T

    in_threads(fill, index.blocks())
    out[:, norms == 0] = 0
    out[norms[rows] == 0] = 0
    return out


def _best(
    index: Index, rows: np.ndarray, similarity: np.ndarray, errors: np.ndarray, k: int | None, threshold: float | None
) -> Neighbors:
    near = rows if threshold is None else rows[similarity[rows] >= threshold]
    near = near[np.argsort(-similarity[near], kind="stable")][:k]
    return Neighbors(
        example_ids=tuple(index.examples["id"].take(pa.array(near)).to_pylist()),
        rows=near,
        similarities=similarity[near],
        standard_errors=errors[near],
    )
