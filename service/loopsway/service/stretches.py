"""Rankings of every example, cut into stretches that fit a message.

n examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loopsway.indexer import Scores
from loopsway.indexer.curation.score_table import Fractions

MOST_EXAMPLES = 10_000  # in a stretch


@dataclass(frozen=True, kw_only=True, eq=False)
class Stretch:
    """Examples of consecutive ranks.

    Attributes:
        step: as in `Influencers`; None: the total.
        first_rank: from 1.
        rows: int64 [n].
        influences: float32 [n], descending.
        standard_errors: float32 [n].
    """

    step: int | None
    first_rank: int
    rows: NDArray[np.int64]
    influences: NDArray[np.float32]
    standard_errors: NDArray[np.float32]


def stretches(scores: Scores, fractions: Fractions, least_magnitude: float) -> Iterator[Stretch]:
    """The rankings of one query's scores, one after another; an empty one is a stretch without examples.

    Args:
        scores: of one query.
        fractions: of each ranking that are kept.
        least_magnitude: of the influences that are kept.
    """
    for place, step in enumerate(scores.steps):
        influences, errors = scores.influences[0, place], scores.standard_errors[0, place]
        order, ranks = fractions.places(influences), fractions.ranks(len(influences))
        strong = np.abs(influences[order]) >= least_magnitude
        order, ranks = order[strong], ranks[strong]
        gaps = np.flatnonzero(np.diff(ranks) > 1) + 1
        for run in np.split(np.arange(len(ranks)), gaps):
            for start in range(0, max(1, len(run)), MOST_EXAMPLES):
                part = run[start : start + MOST_EXAMPLES]
                chosen = order[part]
                yield Stretch(
                    step=step,
                    first_rank=int(ranks[part[0]]) + 1 if len(part) else 1,
                    rows=scores.rows[chosen],
                    influences=influences[chosen],
                    standard_errors=errors[chosen],
                )
