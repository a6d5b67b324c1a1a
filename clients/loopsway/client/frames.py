"""Results as pandas data frames, one row for each number. pandas is imported here alone, and only when it is asked for.

Knows no messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .results import ExampleNeighbors, Influencer, InfluenceResult, ScoreChunk

METADATA = "metadata."  # before the names of metadata columns, which may be any


def ranked_frame(result: InfluenceResult) -> Any:
    """A row for each influencer of each ranking; the step of the total's is missing."""
    rows = [
        _influencer_row(ranking.step, sign, place + 1, influencer)
        for ranking in (result.total, *result.steps)
        for sign, influencers in (("proponent", ranking.proponents), ("opponent", ranking.opponents))
        for place, influencer in enumerate(influencers)
    ]
    columns = ["step", "sign", "rank", "example_id", "influence", "standard_error", "significant", "description"]
    return _frame(rows, columns).astype(
        {"step": "Int64", "rank": "int64", "influence": "float64", "standard_error": "float64"}
    )


def neighbors_frame(result: ExampleNeighbors) -> Any:
    """A row for each neighbor."""
    rows = [
        {
            "example_id": result.example_id,
            "rank": place + 1,
            "neighbor_id": neighbor.example_id,
            "similarity": neighbor.similarity,
            "standard_error": neighbor.standard_error,
            "description": neighbor.description,
        }
        | _metadata_columns(neighbor.metadata)
        for place, neighbor in enumerate(result.neighbors)
    ]
    columns = ["example_id", "rank", "neighbor_id", "similarity", "standard_error", "description"]
    return _frame(rows, columns).astype({"rank": "int64", "similarity": "float64", "standard_error": "float64"})


def scores_frame(chunk: ScoreChunk) -> Any:
    """A row for each example; the step is missing in the ranking over the whole loop."""
    count = len(chunk.example_ids)
    pandas = _pandas()
    return pandas.DataFrame(
        {
            "step": pandas.array([chunk.step] * count, dtype="Int64"),
            "rank": np.arange(chunk.first_rank, chunk.first_rank + count),
            "example_id": list(chunk.example_ids),
            "influence": chunk.influences.copy(),
            "standard_error": chunk.standard_errors.copy(),
            "significant": chunk.significant,
        }
    )


def steps_frame(
    axes: Mapping[str, Sequence[Any]], influences: NDArray[np.float32], standard_errors: NDArray[np.float32]
) -> Any:
    """A row for each number of arrays with these axes: the name of each, and what its places stand for."""
    places = np.indices(influences.shape).reshape(influences.ndim, -1)
    columns: dict[str, Any] = {
        name: np.asarray(values)[place] if len(values) else list(values)
        for (name, values), place in zip(axes.items(), places, strict=True)
    }
    numbers = {"influence": influences.ravel().copy(), "standard_error": standard_errors.ravel().copy()}
    return _pandas().DataFrame({**columns, **numbers})


def _influencer_row(step: int | None, sign: str, rank: int, influencer: Influencer) -> dict[str, Any]:
    row: dict[str, Any] = {
        "step": step,
        "sign": sign,
        "rank": rank,
        "example_id": influencer.example_id,
        "influence": influencer.influence,
        "standard_error": influencer.standard_error,
        "significant": influencer.significant,
        "description": influencer.description,
    }
    return row | _metadata_columns(influencer.metadata)


def _metadata_columns(metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {METADATA + name: value for name, value in metadata.items()}


def _frame(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> Any:
    """These columns, whatever rows there are, and then what else rows have."""
    others = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in columns]
    return _pandas().DataFrame(rows, columns=[*columns, *others])


def _pandas() -> Any:
    try:
        return import_module("pandas")
    except ImportError as error:
        raise ImportError("to_pandas() needs pandas, which the client does without: pip install pandas") from error
