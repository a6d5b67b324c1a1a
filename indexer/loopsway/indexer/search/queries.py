"""What a caller asks with, checked at the door of an index and made ready for its search.

Q queries, T steps of a query, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import SketchConfig
from ..sketches.rotation import rotate_rows


def checked_sketches(query_sketches: Any, width: int) -> tuple[np.ndarray, bool]:
    """The sketches as float32 [Q, T, W], and whether they came as one query's, [T, W].

    Raises:
        ValueError: another shape or width, no query or no step, or values that are not finite.
    """
    sketches = np.ascontiguousarray(query_sketches, dtype=np.float32)
    single = sketches.ndim == 2
    sketches = sketches[None] if single else sketches
    if sketches.ndim != 3 or 0 in sketches.shape or sketches.shape[2] != width:
        raise ValueError(
            f"query sketches have shape {tuple(np.shape(query_sketches))}, expected [steps, {width}] or [queries, "
            f"steps, {width}]: {width} is the index's width"
        )
    if not np.isfinite(sketches).all():
        raise ValueError("query sketches have values that are not finite; check the query's loss and gradients")
    return sketches, single


def query_vectors(sketches: np.ndarray, config: SketchConfig) -> np.ndarray:
    """Rotated sketches of each step and, last, of their sum: float32 [Q, T, W] gives [Q, T + 1, W]."""
    num_queries, num_steps, width = sketches.shape
    vectors = np.empty((num_queries, num_steps + 1, width), np.float32)
    for own, rotated in zip(sketches, vectors, strict=True):
        rotate_rows(own, rotated[:-1], config.seed, config.rotations)
        np.sum(rotated[:-1], axis=0, out=rotated[-1])
    return vectors


def chosen_steps(steps: Sequence[int] | None, count: int) -> list[int]:
    """The steps to rank, each once, all where None.

    Raises:
        ValueError: a step is not from 0 to count - 1.
    """
    if steps is None:
        return list(range(count))
    for step in steps:
        if not 0 <= step < count:
            raise ValueError(f"step {step} does not exist; expected 0 to {count - 1}")
    return list(dict.fromkeys(steps))
