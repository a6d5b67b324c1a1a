"""What the client answers, as JSON for the page."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

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


def influences(result: InfluenceResult, trajectories: Trajectories | None) -> dict[str, Any]:
    """Rankings, the whole loop's first, and the trajectories of its proponents and then its opponents."""
    return {
        "index": result.index,
        "generation": result.generation,
        "recall": result.recall,
        "query": asdict(result.query),
        "rankings": [_ranking(each) for each in (result.total, *result.steps)],
        "trajectories": [] if trajectories is None else _curves(trajectories),
    }


def one_example(example_id: str, about: OneExample) -> dict[str, Any]:
    return {
        "example_id": example_id,
        "shown": None if about.shown is None else _influencer(about.shown),
        "trajectory": _curves(about.trajectory)[0],
        "matrix": _curves(about.matrix)[0],
        "neighbors": [_neighbor(each) for each in about.neighbors],
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


def _curves(trajectories: Trajectories) -> list[dict[str, Any]]:
    """One for each example: [steps] numbers, or [example's steps, query's steps] for a matrix."""
    influences, errors = trajectories.influences[0], trajectories.standard_errors[0]
    return [
        {"influences": own.tolist(), "standard_errors": error.tolist()}
        for own, error in zip(influences, errors, strict=True)
    ]
