"""The hash functions of every sketch, and of the rotation before coding: random numbers that never change.

They are drawn in numpy from counter-based Philox streams (Salmon et al. 2011), one for each (seed, checkpoint,
parameter, role), so that the same key gives the same hash on every device, in every process and release. Only raw
64-bit words are used: numpy promises that raw streams are stable, and does not promise it of its distributions.

Construction 2: a parameter is a matrix of rows x columns (a vector is one row). Entry (r, c) falls into bucket
(row_buckets[r] + column_buckets[c]) mod W with sign row_signs[r] * column_signs[c]. Columns are *contiguous*: within a
segment of W columns, column_buckets[c] = offset + c, so that two columns of a row never collide and a row is added to
the sketch as one shifted run. Row buckets are *distinct*: within a chunk of W rows they are a random permutation of the
buckets, so that two rows never collide as a whole, in every column at once. Any two entries that differ in row and
column collide with probability 1 / (W - 1), those that share one never (within a segment and a chunk), and the signs
keep the estimate unbiased. So for a matrix of at most W rows and W / 2 columns

    Var <A, B> <= (|A|^2 |B|^2 + <A, B>^2) / (W - 1),

that of a CountSketch of all entries by independent hashes (Charikar, Chen and Farach-Colton 2002); TensorSketch with
independent rows and columns (Pham and Pagh 2013) has 2 |A^T B|^2 + 2 |A B^T|^2 beside it, twice as much again for
gradients of low rank. What lies beyond a chunk or a segment collides as independent hashes do.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

CONSTRUCTION = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterHash:
    """Where each entry of one parameter's gradient falls in a sketch of `width` buckets.

    Attributes:
        row_buckets: int64 [R], from 0 to width - 1.
        row_signs: float32 [R], -1 or +1.
        column_buckets: int64 [C], from 0 to width - 1.
        column_signs: float32 [C], -1 or +1.
        width: number of buckets, a power of two.
    """

    row_buckets: np.ndarray
    row_signs: np.ndarray
    column_buckets: np.ndarray
    column_signs: np.ndarray
    width: int


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a parameter of this shape: a matrix keeps its own, anything else is one row."""
    if len(shape) == 2:
        return shape[0], shape[1]
    return 1, int(np.prod(shape, dtype=np.int64))


def parameter_hash(seed: int, checkpoint: str, parameter: str, shape: tuple[int, ...], width: int) -> ParameterHash:
    """The hash of one parameter at one checkpoint; the same arguments always give the same arrays."""
    rows, columns = matrix_shape(shape)
    chunks = -(-rows // width)
    row_words = _words(seed, checkpoint, parameter, "rows", count=chunks * width).reshape(chunks, width)
    column_words = _words(seed, checkpoint, parameter, "columns", count=columns)
    segment_starts = column_words[::width]
    segment_of = np.arange(columns) // width
    column_buckets = (_buckets(segment_starts, width)[segment_of] + np.arange(columns)) % width
    row_buckets = row_words.argsort(axis=1, kind="stable").ravel()[:rows]
    return ParameterHash(
        row_buckets=row_buckets,
        row_signs=_signs(_words(seed, checkpoint, parameter, "row signs", count=rows)),
        column_buckets=column_buckets,
        column_signs=_signs(column_words),
        width=width,
    )


def rotation_signs(seed: int, width: int, rotation: int) -> np.ndarray:
    """Random signs, float32 [W], that make the n-th Walsh-Hadamard transform, from 0, a random rotation."""
    return _signs(_words(seed, "", "", f"rotation {rotation}" if rotation else "rotation", count=width))


def _words(seed: int, checkpoint: str, parameter: str, role: str, *, count: int) -> np.ndarray:
    """The first `count` 64-bit words of the stream with this key."""
    text = "\0".join((str(CONSTRUCTION), str(seed), checkpoint, parameter, role))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
    return np.random.Philox(key=key).random_raw(count)


def _buckets(words: np.ndarray, width: int) -> np.ndarray:
    return (words & np.uint64(width - 1)).astype(np.int64)


def _signs(words: np.ndarray) -> np.ndarray:
    """From the top bit, which no bucket uses."""
    return np.where(words >> np.uint64(63), np.float32(1), np.float32(-1))
