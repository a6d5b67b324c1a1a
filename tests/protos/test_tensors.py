"""Tensors survive the trip through their message, and no message that contradicts itself gets through."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp

from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import from_tensor, to_tensor

DTYPES = st.sampled_from(["<f2", "<f4", "<f8", "<i8", ">f2", ">f4", ">f8", ">i8"])
ARRAYS = DTYPES.flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4))
)


@given(ARRAYS, st.booleans())
def test_an_array_comes_back_bit_for_bit_after_a_trip_over_the_wire(array: np.ndarray, transposed: bool) -> None:
    array = array.T if transposed else array
    back = from_tensor(pb.Tensor.FromString(to_tensor(array).SerializeToString()))
    assert back.shape == array.shape
    assert back.dtype == array.dtype.newbyteorder("<")
    assert back.tobytes() == array.astype(back.dtype).tobytes()


@given(
    st.integers(-1, 5),
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 5), max_size=10),
    st.binary(max_size=200),
)
def test_any_message_is_either_a_consistent_array_or_a_value_error(
    data_type: int, shape: list[int], data: bytes
) -> None:
    tensor = pb.Tensor(data_type=data_type, shape=shape, data=data)  # type: ignore[arg-type]
    try:
        array = from_tensor(tensor)
    except ValueError:
        return
    assert list(array.shape) == shape
    assert array.tobytes() == data
    assert math.prod(shape) * array.itemsize == len(data)


def test_decoding_copies_nothing_and_the_result_cannot_be_written() -> None:
    array = from_tensor(to_tensor(np.ones((2, 3), np.float32)))
    assert not array.flags.owndata
    assert not array.flags.writeable


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_type": pb.DATA_TYPE_UNSPECIFIED}, "data_type is 0, expected one of 1 \\(float32\\)"),
        ({"data_type": pb.DATA_TYPE_FLOAT64}, "data_type is float64, expected float32"),
        ({"shape": [3, 2]}, r"shape is \[3, 2\], expected \[any, 3\]"),
        ({"shape": [6]}, r"shape is \[6\], expected \[any, 3\]"),
        ({"shape": [-2, 3]}, "expected no negative length"),
        ({"shape": [1] * 9}, "shape has 9 dimensions, expected at most 8"),
        ({"data": b"\0" * 23}, "data has 23 bytes, expected 24"),
        ({"data": b""}, "data has 0 bytes, expected 24"),
    ],
)
def test_a_wrong_message_is_named_in_the_error(change: dict, message: str) -> None:
    good = to_tensor(np.ones((2, 3), np.float32))
    parts = {"data_type": good.data_type, "shape": good.shape, "data": good.data} | change
    with pytest.raises(ValueError, match=message):
        from_tensor(pb.Tensor(**parts), dtype="float32", shape=[None, 3])


def test_the_size_limit_holds_before_anything_is_read() -> None:
    tensor = pb.Tensor(data_type=pb.DATA_TYPE_FLOAT32, shape=[2**40, 2**20], data=b"")
    with pytest.raises(ValueError, match="expected at most 100"):
        from_tensor(tensor, max_bytes=100)


def test_a_dtype_that_no_message_holds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"array has dtype int32, expected .*float16.*int64"):
        to_tensor(np.arange(3, dtype=np.int32))
