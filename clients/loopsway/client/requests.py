"""Requests from Python values, for both clients.

Knows no channel. What only the server can judge (ranges, names, widths) is left to it, so that there is one judge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from operator import index as index_of
from typing import SupportsIndex, get_args

import numpy as np

from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import to_tensor

from .errors import InvalidQueryError
from .options import By, Resolve, TrajectoryResolve
from .queries import ExampleQuery, IdQuery, Query, SketchQuery

_SIMILARITY: dict[str, pb.Similarity.ValueType] = {
    "cosine": pb.SIMILARITY_COSINE,
    "inner_product": pb.SIMILARITY_INNER_PRODUCT,
}
_RESOLVE: dict[str, pb.ResolveMode.ValueType] = {
    "query_step": pb.RESOLVE_MODE_QUERY_STEP,
    "train_step": pb.RESOLVE_MODE_TRAIN_STEP,
    "same_step": pb.RESOLVE_MODE_SAME_STEP,
    "step_matrix": pb.RESOLVE_MODE_STEP_MATRIX,
}


def influences_request(
    queries: Sequence[Query],
    *,
    k: int = 10,
    num_proponents: int | None = None,
    num_opponents: int | None = None,
    resolve: Resolve = "query_step",
    steps: Sequence[int] | None = None,
    where: str = "",
    exact: bool = True,
    trajectories: bool = False,
    require_full_coverage: bool = False,
    index: str = "",
) -> pb.FindInfluencesRequest:
    """Keywords are those of `InfluenceOptions`."""
    return pb.FindInfluencesRequest(
        index=index,
        queries=query_messages(queries),
        k=_int32(k, "k"),
        proponent_count=None if num_proponents is None else _int32(num_proponents, "proponent_count"),
        opponent_count=None if num_opponents is None else _int32(num_opponents, "opponent_count"),
        include_trajectories=trajectories,
        resolve=_resolve(resolve, get_args(Resolve)),
        steps=_steps(steps),
        where=where,
        approximate=not exact,
        require_full_coverage=require_full_coverage,
    )


def trajectories_request(
    queries: Sequence[Query],
    example_ids: Sequence[str],
    resolve: TrajectoryResolve,
    steps: Sequence[int] | None,
    index: str,
) -> pb.GetTrajectoriesRequest:
    return pb.GetTrajectoriesRequest(
        index=index,
        queries=query_messages(queries),
        example_ids=_ids(example_ids),
        resolve=_resolve(resolve, get_args(TrajectoryResolve)),
        steps=_steps(steps),
    )


def scores_request(
    queries: Sequence[Query],
    resolve: Resolve,
    steps: Sequence[int] | None,
    where: str,
    top_share: float | None,
    bottom_share: float | None,
    least_magnitude: float,
    require_full_coverage: bool,
    index: str,
) -> pb.ScoreExamplesRequest:
    return pb.ScoreExamplesRequest(
        index=index,
        queries=query_messages(queries),
        resolve=_resolve(resolve, get_args(Resolve)),
        steps=_steps(steps),
        where=where,
        top_share=top_share,
        bottom_share=bottom_share,
        least_magnitude=least_magnitude,
        require_full_coverage=require_full_coverage,
    )


def neighbors_request(
    example_ids: Sequence[str],
    k: int,
    by: By,
    step: int | None,
    threshold: float | None,
    where: str,
    require_full_coverage: bool,
    index: str,
) -> pb.FindNeighborsRequest:
    if by not in _SIMILARITY:
        raise InvalidQueryError(f"by is {by!r}, expected one of {', '.join(_SIMILARITY)}", field="similarity")
    return pb.FindNeighborsRequest(
        index=index,
        example_ids=_ids(example_ids),
        k=_int32(k, "k"),
        similarity=_SIMILARITY[by],
        step=None if step is None else _int32(step, "step"),
        threshold=threshold,
        where=where,
        require_full_coverage=require_full_coverage,
    )


def sketches_request(queries: Sequence[Query], index: str) -> pb.SketchQueriesRequest:
    return pb.SketchQueriesRequest(index=index, queries=query_messages(queries))


def _ids(example_ids: Sequence[str]) -> Sequence[str]:
    if isinstance(example_ids, str):
        raise InvalidQueryError(f"example_ids is one string; write [{example_ids!r}]", field="example_ids")
    return example_ids


def query_messages(queries: Sequence[Query]) -> list[pb.Query]:
    if isinstance(queries, ExampleQuery | IdQuery | SketchQuery):
        raise InvalidQueryError("queries is one query; write [query]", field="queries")
    return [_query(query, f"queries[{i}]") for i, query in enumerate(queries)]


def _query(query: Query, field: str) -> pb.Query:
    match query:
        case ExampleQuery(example):
            return pb.Query(example_json=_json(example, f"{field}.example_json"))
        case IdQuery(example_id):
            return pb.Query(example_id=example_id)
        case SketchQuery():
            return pb.Query(sketch=_sketch(query, f"{field}.sketch.values"))
        case _:  # pyright: ignore[reportUnnecessaryComparison]  # callers without a type checker
            kind = type(query).__name__
            raise InvalidQueryError(
                f"{field} is a {kind}, expected an ExampleQuery, IdQuery or SketchQuery", field=field
            )


def _json(example: object, field: str) -> str:
    try:
        return json.dumps(example, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidQueryError(f"{field}: the example can't be written as JSON: {error}", field=field) from error


def _sketch(query: SketchQuery, field: str) -> pb.Sketch:
    try:
        values = np.asarray(query.values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidQueryError(f"{field}: not an array of numbers: {error}", field=field) from error
    return pb.Sketch(fingerprint=query.fingerprint, values=to_tensor(values))


def _int32(value: SupportsIndex, field: str) -> int:
    try:
        whole = index_of(value)
    except TypeError as error:
        raise InvalidQueryError(f"{field} is {value!r}, expected a whole number", field=field) from error
    if not -(1 << 31) <= whole < 1 << 31:
        raise InvalidQueryError(f"{field} is {whole}, expected a whole number of 32 bits", field=field)
    return whole


def _steps(steps: Sequence[SupportsIndex] | None) -> list[int]:
    if steps is None:
        return []
    if not len(steps):
        raise InvalidQueryError("steps is empty; name one or more, or leave it None for all", field="steps")
    return [_int32(step, f"steps[{i}]") for i, step in enumerate(steps)]


def _resolve(resolve: str, allowed: tuple[str, ...]) -> pb.ResolveMode.ValueType:
    if resolve not in allowed:
        raise InvalidQueryError(f"resolve is {resolve!r}, expected one of {', '.join(allowed)}", field="resolve")
    return _RESOLVE[resolve]
