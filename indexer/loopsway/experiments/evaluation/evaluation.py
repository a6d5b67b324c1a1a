"""The three tests of a subject's influences, over seeds: linear datamodelling score, wrong labels, removal.

M subsets, N training examples, Q queries, R seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .peer import Bergson
from .predictions import (
    ADAM,
    BERGSON,
    COSINE,
    EXACT,
    FIRST_STEP,
    LAST_STEP,
    LOSS,
    MAGIC,
    RANDOM,
    SAME_STEPS,
    TRACIN,
    WHOLE,
    Predictions,
    step_name,
)
from .predictors import predict
from .retraining import KeptRetraining, Retraining, halves
from .statistics import (
    Interval,
    datamodelling_scores,
    detection_area,
    interval_over_seeds,
    interval_over_subsets,
    rank_correlations,
    scores_beyond,
)
from .subject import Subject
from .training import train_with_checkpoints

SCORE, SEED_MEAN, BEYOND = "datamodelling score", "score of the seeds' mean", "score beyond TracIn's"
DETECTION, REMOVAL = "detection area", "removal"
CEILING = "another seed's losses"  # as a method: how much of the measured losses is the data's doing
WRONG_SHARE, REMOVED_SHARE = 0.1, 0.1
REMOVING = (TRACIN, WHOLE, ADAM, COSINE, FIRST_STEP, LAST_STEP, SAME_STEPS, EXACT, BERGSON, MAGIC, LOSS, RANDOM)
REMOVING_BY_STEP = ("query_step", "train_step")  # by the first step of each and the last


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much is measured.

    Attributes:
        num_subsets: M, at least 2.
        seeds: R of them.
        num_removal_queries: queries whose proponents are removed, a training for each method and seed.
    """

    num_subsets: int = 40
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_removal_queries: int = 4

    def __post_init__(self) -> None:
        if self.num_subsets < 2:
            raise ValueError(f"num_subsets is {self.num_subsets}, expected at least 2: ranks of one say nothing")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds are {list(self.seeds)}, expected one or more, each once")

    def num_trainings(self) -> int:
        """Of those that are retrained; the same one may come twice."""
        num_methods = len(REMOVING) + 2 * len(REMOVING_BY_STEP)
        return len(self.seeds) * (self.num_subsets + 1 + self.num_removal_queries * num_methods)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one test found of one method.

    Attributes:
        test: SCORE, SEED_MEAN, BEYOND, DETECTION or REMOVAL.
        method: of `predictions`, or CEILING.
        interval: over seeds; that of SEED_MEAN is over subsets.
        values: one for each seed; none for SEED_MEAN.
    """

    test: str
    method: str
    interval: Interval
    values: tuple[float, ...] = ()


def evaluate(
    subject: Subject,
    folder: Path,
    amount: Amount,
    done: Callable[[], None] = lambda: None,
    bergson: Bergson | None = None,
) -> list[Result]:
    """Trains, predicts, retrains and compares.

    Args:
        subject: what.
        folder: keeps every training and index, which are used again.
        amount: how much.
        done: called after each of `amount.num_trainings()`; there are fewer where a method is left out.
        bergson: None leaves it out.
    """
    retrain = KeptRetraining(subject, folder / "retrained", done)
    predictions = [_predictions(subject, subject.rows, folder / f"seed-{seed}", seed, bergson) for seed in amount.seeds]
    return [
        *linear_scores(predictions, retrain, amount),
        *wrong_labels(subject, folder, amount.seeds, bergson),
        *removals(predictions, retrain, amount),
    ]


def linear_scores(predictions: list[Predictions], retrain: Retraining, amount: Amount) -> list[Result]:
    """How well sums of influences over random halves rank the losses of models trained on these."""
    num_rows = predictions[0].influences[TRACIN].shape[1]
    subsets = halves(num_rows, amount.num_subsets)
    losses = np.array([[retrain(subset, seed) for subset in subsets] for seed in amount.seeds])  # [R, M, Q]
    results = []
    for method in predictions[0].influences:
        each = [found.influences[method] for found in predictions]
        scores = [datamodelling_scores(a, subsets, b).mean() for a, b in zip(each, losses, strict=True)]
        results.append(_over_seeds(SCORE, method, scores))
        if method != TRACIN:
            known = [found.influences[TRACIN] for found in predictions]
            beyond = [scores_beyond(a, b, subsets, c).mean() for a, b, c in zip(each, known, losses, strict=True)]
            results.append(_over_seeds(BEYOND, method, beyond))
        mean = interval_over_subsets(np.mean(each, axis=0), subsets, losses.mean(0))
        results.append(Result(test=SEED_MEAN, method=method, interval=mean))
    if len(losses) > 1:
        results.append(_over_seeds(SCORE, CEILING, _agreement(losses)))
    return results


def wrong_labels(subject: Subject, folder: Path, seeds: Iterable[int], bergson: Bergson | None = None) -> list[Result]:
    """How soon an inspection by self-influence finds the labels that were flipped before training."""
    areas: dict[str, list[float]] = {}
    for seed in seeds:
        wrong = np.zeros(len(subject.rows), bool)
        draw = np.random.default_rng(seed)
        wrong[draw.permutation(len(wrong))[: max(1, round(WRONG_SHARE * len(wrong)))]] = True
        rows = [subject.mislabelled(row) if flip else row for row, flip in zip(subject.rows, wrong, strict=True)]
        by_itself = bergson and replace(bergson, magic=False)  # which says nothing of an example on itself
        found = _predictions(subject, rows, folder / f"wrong-{seed}", seed, by_itself)
        for method, scores in found.self_influences.items():
            areas.setdefault(method, []).append(detection_area(scores, wrong))
    return [_over_seeds(DETECTION, method, values) for method, values in areas.items()]


def removals(predictions: list[Predictions], retrain: Retraining, amount: Amount) -> list[Result]:
    """How much a query's loss rises when its strongest proponents are left out of the training."""
    rises: dict[str, list[float]] = {}
    for found, seed in zip(predictions, amount.seeds, strict=True):
        num_rows = found.influences[TRACIN].shape[1]
        full = retrain(np.ones(num_rows, bool), seed)
        for method in _removing(found):
            queries = range(min(amount.num_removal_queries, len(full)))
            rise = [
                float(retrain(_without_strongest(found.influences[method][query]), seed)[query] - full[query])
                for query in queries
            ]
            rises.setdefault(method, []).append(float(np.mean(rise)))
    return [_over_seeds(REMOVAL, method, values) for method, values in rises.items()]


def _predictions(
    subject: Subject, rows: Sequence[Any], folder: Path, seed: int, bergson: Bergson | None
) -> Predictions:
    return predict(train_with_checkpoints(subject, rows, seed, folder), subject.queries, folder, seed, bergson)


def _removing(found: Predictions) -> list[str]:
    """The methods whose strongest proponents are removed, of those that there are."""
    num_steps = sum(method.startswith("query step ") for method in found.influences)
    by_step = [step_name(resolve, step, num_steps) for resolve in REMOVING_BY_STEP for step in (0, num_steps - 1)]
    return [method for method in (*REMOVING[:4], *by_step, *REMOVING[4:]) if method in found.influences]


def _without_strongest(influences: np.ndarray) -> np.ndarray:
    """All but the strongest tenth, bool [N]."""
    kept = np.ones(len(influences), bool)
    kept[np.argsort(-influences, kind="stable")[: max(1, round(REMOVED_SHARE * len(influences)))]] = False
    return kept


def _agreement(losses: np.ndarray) -> list[float]:
    """For each seed, the mean rank correlation of its losses with each other seed's: [R, M, Q] to R."""
    seeds = range(len(losses))
    return [
        float(np.mean([rank_correlations(losses[seed], losses[other]).mean() for other in seeds if other != seed]))
        for seed in seeds
    ]


def _over_seeds(test: str, method: str, values: Iterable[float]) -> Result:
    values = tuple(float(value) for value in values)
    return Result(test=test, method=method, interval=interval_over_seeds(np.array(values)), values=values)
