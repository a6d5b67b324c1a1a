"""Requests from Python values, and results from responses: everything that the two clients share.

Knows no channel. What only the server can judge (ranges, names, widths) is left to it, so that there is one judge.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC
from operator import index as index_of
from typing import Any, Literal, SupportsIndex, get_args

import numpy as np
from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct, Value

from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import from_tensor, to_tensor

from .errors import InvalidQueryError
from .queries import ExampleQuery, IdQuery, Query, SketchQuery
from .results import (
    CheckpointInfo,
    IndexInfo,
    Influencer,
    InfluenceResult,
    InfluencerTrajectories,
    Neighbor,
    QuerySummary,
    Ranking,
    RefusedGeneration,
    ScoreChunk,
    Trajectories,
)

Resolve = Literal["query_step", "train_step", "same_step"]
TrajectoryResolve = Literal["query_step", "train_step", "same_step", "step_matrix"]

By = Literal["cosine", "inner_product"]

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
    k: int,
    num_proponents: int | None,
    num_opponents: int | None,
    resolve: Resolve,
    steps: Sequence[int] | None,
    where: str,
    exact: bool,
    trajectories: bool,
    require_full_coverage: bool,
    index: str,
) -> pb.FindInfluencesRequest:
    if steps is not None and not len(steps):
        raise InvalidQueryError("steps is empty; name one or more, or leave it None for all", field="steps")
    return pb.FindInfluencesRequest(
        index=index,
        queries=query_messages(queries),
        k=_int32(k, "k"),
        proponent_count=None if num_proponents is None else _int32(num_proponents, "proponent_count"),
        opponent_count=None if num_opponents is None else _int32(num_opponents, "opponent_count"),
        include_trajectories=trajectories,
        resolve=_resolve(resolve, get_args(Resolve)),
        steps=[_int32(step, f"steps[{i}]") for i, step in enumerate(() if steps is None else steps)],
        where=where,
        approximate=not exact,
        require_full_coverage=require_full_coverage,
    )


def trajectories_request(
    queries: Sequence[Query], example_ids: Sequence[str], resolve: TrajectoryResolve, index: str
) -> pb.GetTrajectoriesRequest:
    return pb.GetTrajectoriesRequest(
        index=index,
        queries=query_messages(queries),
        example_ids=_ids(example_ids),
        resolve=_resolve(resolve, get_args(TrajectoryResolve)),
    )


def scores_request(
    queries: Sequence[Query],
    resolve: Resolve,
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
        require_full_coverage=True,
    )


def sketches_request(queries: Sequence[Query], index: str) -> pb.SketchQueriesRequest:
    return pb.SketchQueriesRequest(index=index, queries=query_messages(queries))


def index_info(index: pb.Index) -> IndexInfo:
    checkpoints = tuple(
        CheckpointInfo(name=checkpoint.name, learning_rate=checkpoint.learning_rate, mean_loss=checkpoint.mean_loss)
        for checkpoint in index.checkpoints
    )
    return IndexInfo(
        name=index.name,
        num_examples=index.example_count,
        num_steps=index.step_count,
        width=index.width,
        bits=index.bits,
        fingerprint=index.fingerprint,
        loop_body=tuple(index.loop.body),
        loop_marker=index.loop.marker or None,
        loop_outside=index.loop.outside,
        checkpoints=checkpoints,
        generation=index.generation,
        created_at=index.create_time.ToDatetime(tzinfo=UTC),
        size_bytes=index.size_bytes,
        steps_without_gradient=tuple(index.steps_without_gradient),
        recalls={recall.k: recall.mean for recall in index.recalls},
        accepts_examples=index.accepts_examples,
        max_gradient_bytes=index.max_gradient_bytes,
        refused=_refused(index.refused) if index.HasField("refused") else None,
    )


def _refused(refused: pb.RefusedGeneration) -> RefusedGeneration:
    return RefusedGeneration(
        generation=refused.generation or None,
        reason=refused.reason,
        refused_at=refused.refuse_time.ToDatetime(tzinfo=UTC),
    )


def influence_results(response: pb.FindInfluencesResponse) -> list[InfluenceResult]:
    return [
        InfluenceResult(
            query=_summary(result.query),
            total=_ranking(result.total),
            steps=tuple(_ranking(ranking) for ranking in result.steps),
            recall=result.recall,
            coverage=response.coverage,
            trajectories=_influencer_curves(result.trajectories) if result.HasField("trajectories") else None,
            index=response.index,
            generation=response.generation,
            fingerprint=response.fingerprint,
        )
        for result in response.results
    ]


def _influencer_curves(curves: pb.Trajectories) -> InfluencerTrajectories:
    ids = tuple(curves.example_ids)
    return InfluencerTrajectories(
        example_ids=ids,
        influences=from_tensor(curves.influences, dtype="float32", shape=[len(ids), None]),
        standard_errors=from_tensor(curves.standard_errors, dtype="float32", shape=curves.influences.shape),
    )


def trajectories(response: pb.GetTrajectoriesResponse, example_ids: Sequence[str]) -> Trajectories:
    return Trajectories(
        influences=from_tensor(response.influences, dtype="float32"),
        standard_errors=from_tensor(response.standard_errors, dtype="float32", shape=response.influences.shape),
        queries=tuple(_summary(query) for query in response.queries),
        example_ids=tuple(example_ids),
        index=response.index,
        generation=response.generation,
        fingerprint=response.fingerprint,
    )


def score_chunk(response: pb.ScoreExamplesResponse) -> ScoreChunk:
    count = len(response.example_ids)
    return ScoreChunk(
        step=response.step if response.HasField("step") else None,
        first_rank=response.first_rank,
        example_ids=tuple(response.example_ids),
        influences=from_tensor(response.influences, dtype="float32", shape=[count]),
        standard_errors=from_tensor(response.standard_errors, dtype="float32", shape=[count]),
        coverage=response.coverage,
    )


def neighbors(response: pb.FindNeighborsResponse) -> list[tuple[Neighbor, ...]]:
    return [tuple(_neighbor(neighbor) for neighbor in result.neighbors) for result in response.results]


def sketch_queries(response: pb.SketchQueriesResponse) -> list[SketchQuery]:
    return [
        SketchQuery(from_tensor(sketch.values, dtype="float32"), sketch.fingerprint) for sketch in response.sketches
    ]


def sketch_query(response: pb.SketchGradientsResponse) -> SketchQuery:
    return SketchQuery(from_tensor(response.sketch.values, dtype="float32"), response.sketch.fingerprint)


def _neighbor(neighbor: pb.Neighbor) -> Neighbor:
    return Neighbor(
        example_id=neighbor.example_id,
        description=neighbor.description,
        metadata=_metadata(neighbor.metadata),
        similarity=neighbor.similarity,
        standard_error=neighbor.standard_error,
    )


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


def _resolve(resolve: str, allowed: tuple[str, ...]) -> pb.ResolveMode.ValueType:
    if resolve not in allowed:
        raise InvalidQueryError(f"resolve is {resolve!r}, expected one of {', '.join(allowed)}", field="resolve")
    return _RESOLVE[resolve]


def _summary(query: pb.QuerySummary) -> QuerySummary:
    return QuerySummary(
        num_steps=query.step_count,
        losses=tuple(query.losses),
        steps_without_gradient=tuple(query.steps_without_gradient),
    )


def _ranking(ranking: pb.Ranking) -> Ranking:
    return Ranking(
        step=ranking.step if ranking.HasField("step") else None,
        proponents=tuple(_influencer(influencer) for influencer in ranking.proponents),
        opponents=tuple(_influencer(influencer) for influencer in ranking.opponents),
    )


def _influencer(influencer: pb.Influencer) -> Influencer:
    return Influencer(
        example_id=influencer.example_id,
        description=influencer.description,
        metadata=_metadata(influencer.metadata),
        influence=influencer.influence,
        standard_error=influencer.standard_error,
    )


def _metadata(struct: Struct) -> dict[str, Any]:
    return {key: _plain(struct.fields[key]) for key in sorted(struct.fields)}


def _plain(value: Value) -> Any:
    match value.WhichOneof("kind"):
        case "number_value":
            # A Struct has one kind of number; a count should not come back as 3.0.
            number = value.number_value
            return int(number) if number.is_integer() else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "null_value" | None:
            return None
        case _:
            return MessageToDict(value)
