"""Requests to Python values, checked: the door where everything from the network is looked at once.

What stands behind it trusts the values, but for an example's JSON: the model's process reads it. Each refusal names the
field, in the proto's names.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loopsway.indexer import Index
from loopsway.indexer.config import Resolve
from loopsway.indexer.curation.score_table import Fractions
from loopsway.indexer.search.index import TrajectoryResolve
from loopsway.indexer.search.nearest import By
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import from_tensor

from .errors import InvalidFieldError, PreconditionError
from .queries import ExampleQuery, IdQuery, Query, SketchQuery
from .settings import Settings

DEFAULT_K = 10
# Of one step of a sketch; squares, and products with what an index holds, stay within float32.
MOST_LENGTH = 1e15
MOST_THRESHOLD = 1e30  # of a similarity or an influence, which are float32
_RESOLVE: dict[int, TrajectoryResolve] = {
    pb.RESOLVE_MODE_UNSPECIFIED: "query_step",
    pb.RESOLVE_MODE_QUERY_STEP: "query_step",
    pb.RESOLVE_MODE_TRAIN_STEP: "train_step",
    pb.RESOLVE_MODE_SAME_STEP: "same_step",
    pb.RESOLVE_MODE_STEP_MATRIX: "step_matrix",
}

_SIMILARITY: dict[int, By] = {
    pb.SIMILARITY_UNSPECIFIED: "cosine",
    pb.SIMILARITY_COSINE: "cosine",
    pb.SIMILARITY_INNER_PRODUCT: "inner_product",
}


def queries_from(queries: Sequence[pb.Query], index: Index, settings: Settings) -> list[Query]:
    """The request's queries, at least one."""
    if not queries:
        raise InvalidFieldError("queries is empty, expected at least one", field="queries")
    if len(queries) > settings.max_queries:
        raise InvalidFieldError(
            f"{len(queries)} queries, expected at most {settings.max_queries} in one request", field="queries"
        )
    return [_query(query, f"queries[{i}]", index, settings) for i, query in enumerate(queries)]


def k_from(request: pb.FindInfluencesRequest | pb.FindNeighborsRequest, settings: Settings) -> int:
    k = request.k if request.HasField("k") else DEFAULT_K
    if not 1 <= k <= settings.max_k:
        raise InvalidFieldError(f"k is {k}, expected 1 to {settings.max_k}, or unset for {DEFAULT_K}", field="k")
    return k


def counts_from(request: pb.FindInfluencesRequest, settings: Settings) -> tuple[int, int]:
    """How many proponents and opponents of each ranking are returned; not both 0."""
    k = k_from(request, settings)
    counts = []
    for field in ("proponent_count", "opponent_count"):
        count = getattr(request, field) if request.HasField(field) else k
        if not 0 <= count <= settings.max_k:
            raise InvalidFieldError(f"{field} is {count}, expected 0 to {settings.max_k}, or unset for k", field=field)
        counts.append(count)
    if counts == [0, 0]:
        raise InvalidFieldError(
            "proponent_count and opponent_count are both 0: nothing is asked", field="proponent_count"
        )
    return counts[0], counts[1]


def fractions_from(request: pb.ScoreExamplesRequest) -> Fractions:
    """Which part of each ranking to return."""
    top = request.top_share if request.HasField("top_share") else None
    bottom = request.bottom_share if request.HasField("bottom_share") else None
    for field, share in (("top_share", top), ("bottom_share", bottom)):
        if share is not None and not 0 < share <= 1:
            raise InvalidFieldError(f"{field} is {share}, expected above 0 and at most 1", field=field)
    return Fractions(top=top, bottom=bottom)


def least_magnitude_from(request: pb.ScoreExamplesRequest) -> float:
    if not 0 <= request.least_magnitude <= MOST_THRESHOLD:
        raise InvalidFieldError(
            f"least_magnitude is {request.least_magnitude}, expected a finite number >= 0, at most {MOST_THRESHOLD:g}",
            field="least_magnitude",
        )
    return request.least_magnitude


def similarity_from(similarity: int) -> By:
    by = _SIMILARITY.get(similarity)
    if by is None:
        raise InvalidFieldError(
            f"similarity is {similarity}, which is no Similarity of this server", field="similarity"
        )
    return by


def threshold_from(request: pb.FindNeighborsRequest) -> float | None:
    if not request.HasField("threshold"):
        return None
    if not abs(request.threshold) <= MOST_THRESHOLD:
        raise InvalidFieldError(
            f"threshold is {request.threshold}, expected a finite number, -{MOST_THRESHOLD:g} to {MOST_THRESHOLD:g}",
            field="threshold",
        )
    return request.threshold


def compared_ids_from(example_ids: Sequence[str], settings: Settings) -> list[str]:
    """Of the examples whose neighbors are asked for."""
    if not 1 <= len(example_ids) <= settings.max_queries:
        raise InvalidFieldError(
            f"{len(example_ids)} example ids, expected 1 to {settings.max_queries}", field="example_ids"
        )
    return list(example_ids)


def resolve_from(resolve: int) -> Resolve:
    """How to rank."""
    mode = trajectory_resolve_from(resolve)
    if mode == "step_matrix":
        raise InvalidFieldError(
            "resolve is RESOLVE_MODE_STEP_MATRIX, which has no ranking; ask GetTrajectories", field="resolve"
        )
    return mode


def trajectory_resolve_from(resolve: int) -> TrajectoryResolve:
    mode = _RESOLVE.get(resolve)
    if mode is None:
        raise InvalidFieldError(f"resolve is {resolve}, which is no ResolveMode of this server", field="resolve")
    return mode


def steps_from(steps: Sequence[int]) -> list[int] | None:
    """The steps, ascending; None for all. Whether the loop is that long is known only once the query is resolved."""
    for i, step in enumerate(steps):
        if step < 0:
            raise InvalidFieldError(f"step is {step}, expected >= 0", field=f"steps[{i}]")
        if step in steps[:i]:
            raise InvalidFieldError(f"step {step} is named twice", field=f"steps[{i}]")
    return sorted(steps) or None


def example_ids_from(example_ids: Sequence[str], settings: Settings) -> list[str]:
    if not 1 <= len(example_ids) <= settings.max_example_ids:
        raise InvalidFieldError(
            f"{len(example_ids)} example ids, expected 1 to {settings.max_example_ids}", field="example_ids"
        )
    return list(example_ids)


def _query(query: pb.Query, field: str, index: Index, settings: Settings) -> Query:
    match query.WhichOneof("source"):
        case "example_json":
            return ExampleQuery(text=query.example_json, field=f"{field}.example_json")
        case "example_id":
            return IdQuery(example_id=query.example_id, field=f"{field}.example_id")
        case "sketch":
            return _sketch(query.sketch, f"{field}.sketch", index, settings)
        case _:
            raise InvalidFieldError("the query is empty, expected example_json, example_id or sketch", field=field)


def _sketch(sketch: pb.Sketch, field: str, index: Index, settings: Settings) -> SketchQuery:
    # First, as another construction often has another width too, and is the better explanation.
    if sketch.fingerprint != index.fingerprint:
        raise PreconditionError(
            f"the sketch's fingerprint is {sketch.fingerprint!r}, index {index.name} has {index.fingerprint!r}: it was "
            "made with another seed, width, loop or other checkpoints; sketch the query with the index's own",
            field=f"{field}.fingerprint",
        )
    where = f"{field}.values"
    try:
        values = from_tensor(sketch.values, dtype="float32", shape=[None, index.width])
    except ValueError as error:
        raise InvalidFieldError(f"{error} (steps, width of index {index.name})", field=where) from error
    if not 1 <= len(values) <= settings.max_steps:
        raise InvalidFieldError(f"the sketch has {len(values)} steps, expected 1 to {settings.max_steps}", field=where)
    # One pass: a value that is not finite, or a step that is too long, makes a sum that this is not true of.
    if not np.einsum("sw,sw->s", values, values).max() <= MOST_LENGTH**2:
        _refuse_values(values, where)
    return SketchQuery(values=values)


def _refuse_values(values: NDArray[np.float32], where: str) -> None:
    """Looks for what is wrong with a sketch, more slowly."""
    if not np.isfinite(values).all():
        step, column = np.argwhere(~np.isfinite(values))[0].tolist()
        raise InvalidFieldError(
            f"value [{step}, {column}] is {values[step, column]}, expected finite numbers", field=where
        )
    lengths = np.linalg.norm(values.astype(np.float64), axis=1)
    if lengths.max() > MOST_LENGTH:
        step = int(lengths.argmax())
        raise InvalidFieldError(
            f"step {step} has length {lengths[step]:g}, expected at most {MOST_LENGTH:g}: influences on it would "
            "overflow; scale the query down",
            field=where,
        )
