"""A query's gradients as a stream of requests, made one by one as they are sent.

T terms of a sum, I inputs, O outputs. Large pieces are cut so that no message is much larger than CHUNK_BYTES; what has
been sent is forgotten.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import to_tensor
from loopsway.wire import DenseGradient, FactoredGradient, GradientPiece, QueryGradients, RowGradient

from .errors import InvalidQueryError

CHUNK_BYTES = 2 << 20
FLOATS = ("float16", "float32", "float64")

OnBytes: TypeAlias = Callable[[int, int], object]


def gradient_requests(
    gradients: QueryGradients, index: str, on_progress: OnBytes | None = None
) -> Iterator[pb.SketchGradientsRequest]:
    """The stream; pieces are read while it is iterated.

    Args:
        gradients: the query's.
        index: its name.
        on_progress: called with the bytes sent so far and of all.

    Raises:
        InvalidQueryError: a piece is none; raised before the first request.
    """
    pieces = [_arrays(piece) for piece in gradients.pieces]
    total = sum(array.nbytes for arrays in pieces for array in arrays)
    return _requests(gradients, pieces, total, index, on_progress)


def _requests(
    gradients: QueryGradients,
    pieces: list[tuple[NDArray[Any], ...]],
    total: int,
    index: str,
    on_progress: OnBytes | None,
) -> Iterator[pb.SketchGradientsRequest]:
    header = pb.GradientHeader(index=index, step_count=gradients.num_steps, total_bytes=total)
    yield pb.SketchGradientsRequest(header=header)
    digest, sent = hashlib.sha256(), 0
    for piece, arrays in zip(gradients.pieces, pieces, strict=True):
        for message, tensors in _chunks(piece, arrays):
            for tensor in tensors:
                digest.update(tensor.data)
                sent += len(tensor.data)
            yield pb.SketchGradientsRequest(piece=message)
            if on_progress is not None:
                on_progress(sent, total)
    yield pb.SketchGradientsRequest(end=pb.GradientEnd(sha256=digest.digest()))


def _chunks(
    piece: GradientPiece, arrays: tuple[NDArray[Any], ...]
) -> Iterator[tuple[pb.GradientPiece, tuple[pb.Tensor, ...]]]:
    """Messages of the piece, with the tensors in each: entries cut anywhere, terms and rows between two of them."""
    size = max(1, CHUNK_BYTES // max(1, sum(array[:1].nbytes for array in arrays)))
    for start in range(0, max(1, len(arrays[0])), size):
        tensors = tuple(to_tensor(array[start : start + size]) for array in arrays)
        message = pb.GradientPiece(checkpoint=piece.checkpoint, parameter=piece.parameter, step=piece.step)
        match piece:
            case DenseGradient():
                message.dense.CopyFrom(pb.DenseGradient(values=tensors[0], start=piece.start + start))
            case FactoredGradient():
                message.factors.CopyFrom(pb.FactoredGradient(output_gradients=tensors[0], inputs=tensors[1]))
            case RowGradient():
                message.rows.CopyFrom(pb.RowGradient(rows=tensors[0], values=tensors[1]))
        yield message, tensors


def _arrays(piece: GradientPiece) -> tuple[NDArray[Any], ...]:
    """What the piece's tensors are made of, in the order of their fields, to be cut along the first dimension."""
    match piece:
        case DenseGradient():
            return (_floats(piece, piece.values).reshape(-1),)
        case FactoredGradient():
            return _of_one_length(piece, _floats(piece, piece.output_gradients), _floats(piece, piece.inputs))
        case RowGradient():
            return _of_one_length(piece, np.asarray(piece.rows, np.int64), _floats(piece, piece.values))
        case _:  # pyright: ignore[reportUnnecessaryComparison]  # callers without a type checker
            raise InvalidQueryError(
                f"a piece is a {type(piece).__name__}, expected a DenseGradient, FactoredGradient or RowGradient",
                field="piece",
            )


def _floats(piece: GradientPiece, values: NDArray[Any]) -> NDArray[Any]:
    array = np.asarray(values)
    if array.dtype.newbyteorder("=").name in FLOATS:
        return array
    try:
        return array.astype(np.float32)
    except (TypeError, ValueError) as error:
        raise InvalidQueryError(f"the gradient of {piece.parameter} is no array of numbers: {error}",
                                field="piece") from error  # fmt: skip


def _of_one_length(piece: GradientPiece, first: NDArray[Any], second: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    if not first.ndim or not second.ndim or len(first) != len(second):
        raise InvalidQueryError(
            f"the gradient of {piece.parameter} has arrays of shapes {first.shape} and {second.shape}, expected one "
            "length",
            field="piece",
        )
    return first, second
