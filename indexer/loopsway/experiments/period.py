"""Whether a series repeats itself, and after how many steps; knows nothing of models.

L steps, D dimensions.
"""

from __future__ import annotations

import numpy as np

CLEARER = 0.5  # a period's recurrence, at the most, of that of one step


def recurrences(series: np.ndarray, longest: int) -> np.ndarray:
    """How unlike the series, [L, D], is itself p steps later, for p from 1 to `longest`.

    The mean squared distance over twice the variance: 0 for a repetition, about 1 for points unrelated to each other.
    """
    centred = series - series.mean(0)
    spread = 2 * (centred**2).sum(1).mean()
    distances = [((centred[p:] - centred[:-p]) ** 2).sum(1).mean() for p in range(1, longest + 1)]
    return np.array(distances) / spread if spread > 0 else np.zeros(longest)


def period(series: np.ndarray) -> int | None:
    """The shortest period, from 2 steps to a third of the series; None where it settles, drifts or wanders.

    A series that settles or drifts is most like itself after one step. A period is a local minimum far below that.
    """
    found = recurrences(series, max(3, len(series) // 3) + 1)
    for p in range(2, len(found)):  # found[p - 1] is of p steps
        if found[p - 1] < CLEARER * found[0] and found[p - 1] <= min(found[p - 2], found[p]):
            return p
    return None
