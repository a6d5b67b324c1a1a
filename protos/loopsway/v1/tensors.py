"""numpy arrays to and from `Tensor` messages, checked strictly in both directions.

Knows nothing of what the numbers mean: whether values must be finite or which shape a field wants is the caller's
business. Bytes come from the network, so nothing is allocated or reshaped before its size is known to be right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopsway.v1 import attribution_pb2 as pb

MAX_DIMENSIONS = 8
MAX_BYTES = 1 << 30

# Little-endian on every machine; numpy treats "<f4" as its native float32 where that is the same.
_DTYPES: dict[pb.DataType.ValueType, np.dtype[Any]] = {
    pb.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    pb.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    pb.DATA_TYPE_FLOAT64: np.dtype("<f8"),
    pb.DATA_TYPE_INT64: np.dtype("<i8"),
}
_DATA_TYPES = {dtype: data_type for data_type, dtype in _DTYPES.items()}


def to_tensor(array: NDArray[Any]) -> pb.Tensor:
    """The message that holds the array; one copy of its bytes is made.

    Args:
        array: float16, float32, float64 or int64, of any memory layout and byte order, at most 8 dimensions.

    Raises:
        ValueError: the array has another dtype or more dimensions.
    """
    dtype = array.dtype.newbyteorder("<")
    data_type = _DATA_TYPES.get(dtype)
    if data_type is None:
        raise ValueError(f"array has dtype {array.dtype}, expected {_names(_DTYPES)}: convert it first")
    if array.ndim > MAX_DIMENSIONS:
        raise ValueError(f"array has {array.ndim} dimensions, expected at most {MAX_DIMENSIONS}")
    data = array.astype(dtype, copy=False).tobytes(order="C")
    return pb.Tensor(data_type=data_type, shape=array.shape, data=data)


def from_tensor(
    tensor: pb.Tensor,
    *,
    dtype: str | None = None,
    shape: Sequence[int | None] | None = None,
    max_bytes: int = MAX_BYTES,
) -> NDArray[Any]:
    """The array that the message holds: read-only, a view of the message's bytes.

    Args:
        tensor: the message.
        dtype: the dtype that it must have, such as "float32". None: any.
        shape: the shape that it must have; None in it stands for any length. None: any shape.
        max_bytes: the largest size to accept.

    Raises:
        ValueError: the message contradicts itself, or is not what was asked for.
    """
    own = _DTYPES.get(tensor.data_type)
    if own is None:
        raise ValueError(f"data_type is {tensor.data_type}, expected one of {_names(_DTYPES)}")
    if dtype is not None and own != np.dtype(dtype):
        raise ValueError(f"data_type is {own.name}, expected {np.dtype(dtype).name}")
    lengths = tuple(tensor.shape)
    _check_shape(lengths, shape)
    expected, data = math.prod(lengths) * own.itemsize, tensor.data
    if expected > max_bytes:
        raise ValueError(f"shape {_show(lengths)} of {own.name} is {expected} bytes, expected at most {max_bytes}")
    if len(data) != expected:
        raise ValueError(f"data has {len(data)} bytes, expected {expected} for shape {_show(lengths)} of {own.name}")
    return np.frombuffer(data, dtype=own).reshape(lengths)


def _check_shape(lengths: tuple[int, ...], wanted: Sequence[int | None] | None) -> None:
    if len(lengths) > MAX_DIMENSIONS:
        raise ValueError(f"shape has {len(lengths)} dimensions, expected at most {MAX_DIMENSIONS}")
    if any(length < 0 for length in lengths):
        raise ValueError(f"shape is {_show(lengths)}, expected no negative length")
    if wanted is None:
        return
    same_rank = len(lengths) == len(wanted)
    if not same_rank or any(want not in (None, length) for length, want in zip(lengths, wanted, strict=True)):
        raise ValueError(f"shape is {_show(lengths)}, expected {_show(wanted)}")


def _show(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if length is None else str(length) for length in shape) + "]"


def _names(dtypes: dict[pb.DataType.ValueType, np.dtype[Any]]) -> str:
    return ", ".join(f"{data_type} ({dtype.name})" for data_type, dtype in dtypes.items())
