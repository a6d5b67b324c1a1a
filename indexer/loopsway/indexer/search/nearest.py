"""The rows whose codes are most like those of some others.

n rows asked about, R rows of a range, L stored values of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .scan import in_threads
from .similarity import agreements, cosines

By = Literal["cosine", "inner_product"]
GoOn = Callable[[], object]


@dataclass(frozen=True, kw_only=True, eq=False)
class Compared:
    """Rows that others are compared with, and how.

    Attributes:
        rows: int64 [n]; no row is in its own answer.
        codes: [n, L].
        norms: float32 [n], of the sketches.
        by: what the similarity is.
        k: at most so many for each; None: all.
        threshold: the least similarity; None: any.
    """

    rows: np.ndarray
    codes: np.ndarray
    norms: np.ndarray
    by: By
    k: int | None
    threshold: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Near:
    """Rows like one, the most alike first; equal ones by row.

    Attributes:
        rows: int64 [c].
        similarities: float32 [c].
        standard_errors: float32 [c].
    """

    rows: np.ndarray
    similarities: np.ndarray
    standard_errors: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class Others:
    """The rows that are compared.

    Attributes:
        blocks: their numbers, block by block.
        codes: reads those of a block, [c, L].
        norms: float32 [R], of the sketches.
        bits: of a stored coordinate.
    """

    blocks: Sequence[range]
    codes: Callable[[range], np.ndarray]
    norms: np.ndarray
    bits: int


def compared(codes: np.ndarray, norms: np.ndarray, others: Others, go_on: GoOn | None = None) -> np.ndarray:
    """Agreements of codes [n, L] with those of the others, float32 [n, R]; `go_on` is called before each block."""
    out, first = np.zeros((len(codes), len(others.norms)), np.float32), others.blocks[0].start

    def fill(block: range) -> None:
        if go_on is not None:
            go_on()
        out[:, block.start - first : block.stop - first] = agreements(others.codes(block), codes, others.bits).T

    in_threads(fill, others.blocks)
    out[:, others.norms == 0] = 0
    out[norms == 0] = 0
    return out


def nearest(asked: Compared, others: Others, may: np.ndarray, width: int, go_on: GoOn | None = None) -> list[Near]:
    """The others most like each row, of those that are bool [R] `may`; `go_on` as in `compared`."""
    similarity, errors = cosines(compared(asked.codes, asked.norms, others, go_on), others.bits, width)  # [n, R]
    if asked.by == "inner_product":
        products = asked.norms[:, None] * others.norms
        similarity, errors = similarity * products, errors * products
    first, places = others.blocks[0].start, np.flatnonzero(may)
    found = []
    for row, near, error in zip(asked.rows, similarity, errors, strict=True):
        own = places[places + first != row]
        own = own if asked.threshold is None else own[near[own] >= asked.threshold]
        own = own[np.argsort(-near[own], kind="stable")][: asked.k]
        found.append(Near(rows=own + first, similarities=near[own], standard_errors=error[own]))
    return found


def best_of(found: Sequence[Near], k: int | None) -> Near:
    """The most alike of what was found in several ranges of rows."""
    rows, similarities, errors = (
        np.concatenate([getattr(each, name) for each in found]) for name in ("rows", "similarities", "standard_errors")
    )
    order = np.lexsort((rows, -similarities))[:k]
    return Near(rows=rows[order], similarities=similarities[order], standard_errors=errors[order])
