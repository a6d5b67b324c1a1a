"""The statistics of an evaluation, against cases whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from loopsway.experiments.evaluation.retraining import halves
from loopsway.experiments.evaluation.statistics import (
    datamodelling_scores,
    detection_area,
    interval_over_seeds,
    interval_over_subsets,
    rank_correlations,
    scores_beyond,
)

ROWS, SUBSETS, QUERIES = 60, 40, 8


def linear_world(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True influences [Q, N], subsets, and losses that fall by exactly the sum of them."""
    influences = np.random.default_rng(seed).standard_normal((QUERIES, ROWS))
    subsets = halves(ROWS, SUBSETS)
    return influences, subsets, 3 - subsets @ influences.T


def test_the_true_linear_model_has_a_score_of_one_and_its_opposite_of_minus_one() -> None:
    influences, subsets, losses = linear_world(0)
    np.testing.assert_allclose(datamodelling_scores(influences, subsets, losses), 1)
    np.testing.assert_allclose(datamodelling_scores(-influences, subsets, losses), -1)
    interval = interval_over_subsets(influences, subsets, losses)
    np.testing.assert_allclose([interval.mean, interval.low, interval.high], 1)


def test_a_score_depends_on_ranks_alone() -> None:
    influences, subsets, losses = linear_world(0)
    np.testing.assert_allclose(datamodelling_scores(7 * influences, subsets, np.exp(losses)), 1)


def test_random_influences_have_a_score_of_zero_within_its_deviation() -> None:
    trials = 50
    scores = []
    for trial in range(trials):
        _, subsets, losses = linear_world(trial)
        scores.append(datamodelling_scores(np.random.default_rng(999 + trial).standard_normal((1, ROWS)), subsets,
                                           losses[:, :1])[0])  # fmt: skip
    # Under independence Spearman's coefficient of M pairs has variance 1 / (M - 1).
    assert abs(np.mean(scores)) < 4 / np.sqrt((SUBSETS - 1) * trials)
    assert 0.7 < np.std(scores) * np.sqrt(SUBSETS - 1) < 1.3


def test_noise_in_the_losses_lowers_the_score_and_widens_its_interval() -> None:
    influences, subsets, losses = linear_world(0)
    noisy = losses + 4 * np.random.default_rng(5).standard_normal(losses.shape)
    interval = interval_over_subsets(influences, subsets, noisy)
    assert 0 < interval.low < interval.mean < interval.high < 1


def test_rank_correlations_are_scipys_with_ties_and_zero_of_a_constant() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.integers(5, size=(30, 3)), draw.integers(5, size=(30, 3))
    results: list[Any] = [spearmanr(a[:, column], b[:, column]) for column in range(3)]
    expected = [result.statistic for result in results]
    np.testing.assert_allclose(rank_correlations(a, b), expected)
    assert rank_correlations(np.ones((30, 1)), b[:, :1])[0] == 0


def test_what_is_beyond_known_influences_is_found_and_a_copy_of_them_has_nothing() -> None:
    known, subsets, losses = linear_world(0)
    other = np.random.default_rng(7).standard_normal(known.shape)
    both = losses - subsets @ other.T
    assert (scores_beyond(other, known, subsets, both) > 0.8).all()
    np.testing.assert_allclose(scores_beyond(2 * known, known, subsets, both), 0, atol=1e-9)
    # Of what is unrelated the coefficient's variance is 1 / (M - 2), as one rank was regressed out.
    draw = np.random.default_rng(8).standard_normal((QUERIES, ROWS))
    assert abs(scores_beyond(draw, known, subsets, both).mean()) < 4 / np.sqrt((SUBSETS - 2) * QUERIES)


def test_students_interval_covers_the_truth_as_often_as_it_says() -> None:
    trials, draw = 2000, np.random.default_rng(0)
    found = [interval_over_seeds(draw.standard_normal(5)) for _ in range(trials)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in found])
    assert abs(covered - 0.95) < 4 * np.sqrt(0.95 * 0.05 / trials)


def test_one_seed_has_no_interval() -> None:
    interval = interval_over_seeds(np.array([0.25]))
    assert interval.mean == 0.25
    assert np.isnan([interval.low, interval.high]).all()


def test_the_detection_area_is_that_of_the_curve_drawn_point_by_point() -> None:
    draw = np.random.default_rng(1)
    scores, wrong = draw.standard_normal(50), draw.random(50) < 0.2
    found = np.concatenate([[0], np.cumsum(wrong[np.argsort(-scores)]) / wrong.sum()])
    assert detection_area(scores, wrong) == pytest.approx(((found[1:] + found[:-1]) / 2).mean())


def test_the_detection_area_of_perfection_and_of_no_opinion() -> None:
    wrong = np.arange(100) < 10
    assert detection_area(wrong.astype(float), wrong) == pytest.approx(0.95)
    assert detection_area(-wrong.astype(float), wrong) == pytest.approx(0.05)
    assert detection_area(np.zeros(100), wrong) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no label is wrong"):
        detection_area(np.zeros(100), np.zeros(100, bool))


def test_halves_are_halves_the_same_ones_each_time() -> None:
    subsets = halves(ROWS, SUBSETS)
    assert (subsets.sum(1) == ROWS // 2).all()
    assert (subsets == halves(ROWS, SUBSETS)).all()
    assert len(np.unique(subsets, axis=0)) == SUBSETS
    assert (halves(ROWS, 3) == subsets[:3]).all()  # more subsets are those before, and further ones
