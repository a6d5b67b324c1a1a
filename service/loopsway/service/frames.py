"""What the server and its model process say to each other: a message in JSON, and arrays as raw bytes behind it.

Data alone: nothing that is read here can name code to be run.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

LENGTH = struct.Struct("<Q")  # of a frame, before it; and of its JSON, at its start

Message = dict[str, Any]


def encoded(message: Message, arrays: Sequence[np.ndarray] = ()) -> bytes:
    """A frame, its length before it."""
    shapes = [[array.dtype.str, list(array.shape)] for array in arrays]
    text = json.dumps([message, shapes]).encode()
    parts = [LENGTH.pack(len(text)), text, *(np.ascontiguousarray(array).tobytes() for array in arrays)]
    return LENGTH.pack(sum(map(len, parts))) + b"".join(parts)


def decoded(frame: bytes) -> tuple[Message, list[np.ndarray]]:
    """Of a frame without its length; the arrays are read-only."""
    (size,) = LENGTH.unpack_from(frame)
    at = LENGTH.size + size
    message, shapes = json.loads(frame[LENGTH.size : at])
    arrays = []
    for dtype, shape in shapes:
        array = np.frombuffer(frame, dtype, count=math.prod(shape), offset=at).reshape(shape)
        arrays.append(array)
        at += array.nbytes
    return message, arrays
