"""What the client answers, as JSON for the page."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopsway.client import IndexInfo, Influencer, InfluenceResult, Neighbor, Ranking, Trajectories

from .asking import OneExample


def index(info: IndexInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "num_examples": info.num_examples,
        "num_steps": info.num_steps,
        "width": info.width,
        "bits": info.bits,
        "loop_outside": info.loop_outside,
        "checkpoints": [checkpoint.name for checkpoint in info.checkpoints],
        "generation": info.generation,
        "accepts_examples": info.accepts_examples,
    }


def example(each: Influencer) -> dict[str, Any]:
    return {"example_id": each.example_id, "description": each.description, "metadata": dict(each.metadata)}


def influences(result: InfluenceResult) -> dict[str, Any]:
    """Rankings, the whole loop's first; and the trajectory of each example in them, by its id."""
    curves: dict[str, Any] = {}
    if result.trajectories is not None:
        each = result.trajectories
        curves = dict(zip(each.example_ids, _curves(each.influences, each.standard_errors), strict=True))
    return {
        "index": result.index,
        "generation": result.generation,
        "recall": result.recall,
        "coverage": result.coverage,
        "query": asdict(result.query),
        "rankings": [_ranking(each) for each in (result.total, *result.steps)],
        "trajectories": curves,
    }


def one_example(example_id: str, about: OneExample) -> dict[str, Any]:
    return {
        "example_id": example_id,
        "shown": None if about.shown is None else _influencer(about.shown),
        "trajectory": _only_curve(about.trajectory),
        "matrix": _only_curve(about.matrix),
        "neighbors": [_neighbor(each) for each in about.neighbors.neighbors],
        "neighbors_coverage": about.neighbors.coverage,
    }


def _ranking(ranking: Ranking) -> dict[str, Any]:
    return {
        "step": ranking.step,
        "proponents": [_influencer(each) for each in ranking.proponents],
        "opponents": [_influencer(each) for each in ranking.opponents],
    }


def _influencer(each: Influencer) -> dict[str, Any]:
    numbers = {"influence": each.influence, "standard_error": each.standard_error, "significant": each.significant}
    return example(each) | numbers


def _neighbor(each: Neighbor) -> dict[str, Any]:
    return {
        "example_id": each.example_id,
        "description": each.description,
        "similarity": each.similarity,
        "standard_error": each.standard_error,
    }


def _only_curve(trajectories: Trajectories) -> dict[str, Any]:
    (curve,) = _curves(trajectories.influences[0], trajectories.standard_errors[0])
    return curve


def _curves(influences: NDArray[np.float32], errors: NDArray[np.float32]) -> list[dict[str, Any]]:
    """One for each example: [steps] numbers, or [example's steps, query's steps] for a matrix."""
    return [
        {"influences": own.tolist(), "standard_errors": error.tolist()}
        for own, error in zip(influences, errors, strict=True)
    ]
