"""Rank correlations, areas and intervals; knows nothing of models.

M subsets, N training examples, Q queries, R seeds. The linear datamodelling score is that of Park et al. 2023 (TRAK,
arXiv 2303.14186), section 2: how well sums of influences over a subset rank the losses of models trained on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata, t

RESAMPLES = 300
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval at LEVEL; low and high are NaN where there is too little to tell."""

    mean: float
    low: float
    high: float


def rank_correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's, of each column: [M, Q] and [M, Q] to [Q]; 0 where one of the two is constant."""
    return _correlations(_centred_ranks(a), _centred_ranks(b))


def partial_rank_correlations(a: np.ndarray, b: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Of what is left of the ranks of a and b, each [M, Q], once those of `given`, [M, Q], are regressed out."""
    a, b, given = _centred_ranks(a), _centred_ranks(b), _centred_ranks(given)
    size = np.maximum((given**2).sum(0), 1e-30)
    return _correlations(*(each - given * (each * given).sum(0) / size for each in (a, b)))


def datamodelling_scores(influences: np.ndarray, subsets: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """The linear datamodelling score of each query.

    Args:
        influences: [Q, N], positive where a step on the example lowers the query's loss.
        subsets: bool [M, N], the examples that each model was trained on.
        losses: [M, Q], of the queries under these models.
    """
    return rank_correlations(subsets @ influences.T, -losses)


def scores_beyond(influences: np.ndarray, known: np.ndarray, subsets: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """What of the losses the influences rank that other influences, `known`, don't: [Q]. Arguments as above."""
    return partial_rank_correlations(subsets @ influences.T, -losses, subsets @ known.T)


def interval_over_subsets(influences: np.ndarray, subsets: np.ndarray, losses: np.ndarray) -> Interval:
    """The mean score over the queries, with a percentile bootstrap over subsets: queries share them."""
    draw, predicted = np.random.default_rng(0), subsets @ influences.T
    means = []
    for _ in range(RESAMPLES):
        rows = draw.integers(len(losses), size=len(losses))
        means.append(rank_correlations(predicted[rows], -losses[rows]).mean())
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = datamodelling_scores(influences, subsets, losses).mean()
    return Interval(mean=float(mean), low=float(low), high=float(high))


def interval_over_seeds(values: np.ndarray) -> Interval:
    """The mean of [R] values, with Student's interval."""
    values = np.asarray(values, np.float64)
    half = np.nan
    if len(values) > 1:
        half = t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    mean = values.mean()
    return Interval(mean=float(mean), low=float(mean - half), high=float(mean + half))


def detection_area(scores: np.ndarray, wrong: np.ndarray) -> float:
    """The area under the detection curve: the share of wrong labels found, against the share of examples inspected.

    Examples are inspected from the largest score down. A draw has 0.5, perfection 1 - (share of wrong labels) / 2.

    Args:
        scores: [N]; of equal ones, each order is as likely as another.
        wrong: bool [N], at least one.
    """
    if not wrong.any():
        raise ValueError("no label is wrong, so there is nothing to detect; flip at least one")
    ranks = rankdata(-scores)  # 1 is inspected first
    return float(1 - (ranks[wrong] - 0.5).mean() / len(scores))


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    ranks = rankdata(values, axis=0)
    return ranks - ranks.mean(0)


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of centred columns; 0 where one of the two is nothing but rounding."""
    sizes = np.sqrt((a**2).sum(0) * (b**2).sum(0))
    return np.divide((a * b).sum(0), sizes, out=np.zeros(a.shape[1]), where=sizes > 1e-9)
