"""Results from responses, for both clients. Knows no channel."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct, Value

from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import from_tensor

from .queries import SketchQuery
from .results import (
    CheckpointInfo,
    ExampleNeighbors,
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
        aliases=tuple(index.aliases),
        server_version=index.server_version or None,
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
        steps=tuple(response.steps),
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
        queries=tuple(_summary(query) for query in response.queries),
        index=response.index,
        generation=response.generation,
        fingerprint=response.fingerprint,
    )


def neighbors(response: pb.FindNeighborsResponse, example_ids: Sequence[str]) -> list[ExampleNeighbors]:
    return [
        ExampleNeighbors(
            example_id=example_id,
            neighbors=tuple(_neighbor(neighbor) for neighbor in result.neighbors),
            coverage=response.coverage,
            index=response.index,
            generation=response.generation,
            fingerprint=response.fingerprint,
        )
        for example_id, result in zip(example_ids, response.results, strict=True)
    ]


def sketch_queries(response: pb.SketchQueriesResponse) -> list[SketchQuery]:
    return [
        SketchQuery(from_tensor(sketch.values, dtype="float32"), sketch.fingerprint, _summary(query))
        for sketch, query in zip(response.sketches, response.queries, strict=True)
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
