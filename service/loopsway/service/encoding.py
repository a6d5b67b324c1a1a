"""Answers to response messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from google.protobuf.struct_pb2 import Struct

from loopsway.indexer import Index, Influencers, Neighbors
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import to_tensor

from .answers import Curves, Influences, Trajectories
from .engine import Engine
from .queries import ResolvedQuery
from .served import RefusedGeneration
from .stretches import Stretch
from .version import server_version

# Beyond it, a double skips whole numbers.
MAX_EXACT_INTEGER = 1 << 53


def index_message(engine: Engine, refused: RefusedGeneration | None, aliases: Sequence[str]) -> pb.Index:
    """Measures the index's size on disk: not for the event loop."""
    index = engine.index
    message = pb.Index(
        name=index.name,
        example_count=index.num_examples,
        step_count=index.num_steps,
        width=index.width,
        bits=index.bits,
        fingerprint=index.fingerprint,
        loop=pb.Loop(body=index.loop.body, marker=index.loop.marker or "", outside=index.loop.outside),
        checkpoints=[
            pb.Checkpoint(name=checkpoint.name, learning_rate=checkpoint.learning_rate, mean_loss=float(loss))
            for checkpoint, loss in zip(index.checkpoints, index.mean_losses(), strict=True)
        ],
        generation=index.generation,
        size_bytes=index.size_bytes,
        steps_without_gradient=index.steps_without_gradient,
        recalls=_recalls(index.recall),
        accepts_examples=engine.accepts_examples,
        max_gradient_bytes=engine.max_gradient_bytes,
        aliases=aliases,
        server_version=server_version(),
    )
    message.create_time.FromDatetime(datetime.fromisoformat(index.created_at))
    if refused is not None:
        message.refused.generation, message.refused.reason = refused.generation, refused.reason
        message.refused.refuse_time.FromDatetime(refused.refused_at)
    return message


def influences_response(answers: Sequence[Influences], index: Index) -> pb.FindInfluencesResponse:
    response = pb.FindInfluencesResponse(
        index=index.name,
        generation=index.generation,
        fingerprint=index.fingerprint,
        coverage=min(answer.ranking.coverage for answer in answers),
    )
    facts = _facts(answers, index)
    for answer in answers:
        # Filled in place: a message that is put into another is encoded and parsed for it.
        result = response.results.add(query=_query_message(answer.query), recall=answer.ranking.recall)
        _fill(result.total, answer.ranking.total, facts)
        for step in answer.ranking.steps:
            _fill(result.steps.add(step=step.step), step, facts)
        if answer.curves is not None:
            result.trajectories.CopyFrom(_curves_message(answer.curves))
    return response


def _curves_message(curves: Curves) -> pb.Trajectories:
    return pb.Trajectories(
        example_ids=curves.example_ids,
        influences=to_tensor(curves.influences),
        standard_errors=to_tensor(curves.standard_errors),
    )


def trajectories_response(answer: Trajectories, index: Index) -> pb.GetTrajectoriesResponse:
    return pb.GetTrajectoriesResponse(
        influences=to_tensor(answer.influences),
        standard_errors=to_tensor(answer.standard_errors),
        queries=[_query_message(query) for query in answer.queries],
        steps=answer.steps,
        index=index.name,
        generation=index.generation,
        fingerprint=index.fingerprint,
    )


def scores_responses(
    queries: Sequence[ResolvedQuery], parts: Iterator[Stretch], coverage: float, index: Index
) -> Iterator[pb.ScoreExamplesResponse]:
    """A message for each stretch."""
    for number, part in enumerate(parts):
        yield pb.ScoreExamplesResponse(
            step=part.step,
            first_rank=part.first_rank,
            example_ids=index.ids_in(part.rows),
            influences=to_tensor(part.influences),
            standard_errors=to_tensor(part.standard_errors),
            queries=[_query_message(query) for query in queries] if not number else [],
            index=index.name,
            generation=index.generation,
            fingerprint=index.fingerprint,
            coverage=coverage,
        )


def neighbors_response(found: Sequence[Neighbors], index: Index) -> pb.FindNeighborsResponse:
    results = []
    for each in found:
        columns = (each.similarities.tolist(), each.standard_errors.tolist(), index.examples_in(each.rows))
        messages = [
            pb.Neighbor(
                example_id=example.id,
                description=example.description,
                metadata=metadata_struct(example.metadata),
                similarity=similarity,
                standard_error=error,
            )
            for similarity, error, example in zip(*columns, strict=True)
        ]
        results.append(pb.ExampleNeighbors(neighbors=messages))
    return pb.FindNeighborsResponse(
        results=results,
        index=index.name,
        generation=index.generation,
        fingerprint=index.fingerprint,
        coverage=min(each.coverage for each in found),
    )


def sketches_response(queries: Sequence[ResolvedQuery], index: Index) -> pb.SketchQueriesResponse:
    return pb.SketchQueriesResponse(
        sketches=[pb.Sketch(fingerprint=index.fingerprint, values=to_tensor(query.sketch)) for query in queries],
        queries=[_query_message(query) for query in queries],
        index=index.name,
    )


def metadata_struct(metadata: Mapping[str, Any]) -> Struct:
    """The metadata as a Struct; an integer that a double can't hold becomes a decimal string."""
    struct = Struct()
    struct.update({key: _exact(value) for key, value in metadata.items()})
    return struct


def _exact(value: Any) -> Any:
    is_big = isinstance(value, int) and abs(value) > MAX_EXACT_INTEGER
    return str(value) if is_big else value


def _recalls(recall: Mapping[str, Any]) -> list[pb.Recall]:
    found = ((re.fullmatch(r"recall@(\d+)", key), value) for key, value in recall.items())
    recalls = [pb.Recall(k=int(match[1]), mean=value) for match, value in found if match]
    return sorted(recalls, key=lambda recall: recall.k)


def _query_message(query: ResolvedQuery) -> pb.QuerySummary:
    return pb.QuerySummary(
        step_count=query.num_steps, losses=query.losses, steps_without_gradient=query.steps_without_gradient
    )


def _facts(answers: Sequence[Influences], index: Index) -> dict[int, bytes]:
    """What is known of each example in the answers, by its row: one that is strong at one step is so at many."""
    rows = np.unique(
        np.concatenate(
            [
                side.rows
                for answer in answers
                for ranking in (answer.ranking.total, *answer.ranking.steps)
                for side in (ranking.proponents, ranking.opponents)
            ]
        )
    )
    columns = index.columns_in(rows)
    return {
        row: pb.Influencer(
            example_id=each, description=description, metadata=metadata_struct(metadata) if metadata else None
        ).SerializeToString()
        for row, each, description, metadata in zip(
            rows.tolist(), columns["id"], columns["description"], columns["metadata"], strict=True
        )
    }


def _fill(ranking: pb.Ranking, influencers: Influencers, facts: Mapping[int, bytes]) -> None:
    sides = ((ranking.proponents, influencers.proponents), (ranking.opponents, influencers.opponents))
    for messages, ranked in sides:
        columns = (ranked.rows.tolist(), ranked.influences.tolist(), ranked.standard_errors.tolist())
        for row, influence, standard_error in zip(*columns, strict=True):
            message = messages.add()
            message.MergeFromString(facts[row])
            message.influence, message.standard_error = influence, standard_error
