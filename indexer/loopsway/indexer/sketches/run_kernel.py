"""Adds runs into a `RunAccumulator`'s buffer on a GPU, in Triton: every float of the buffer gathers what is its own.

B examples, N runs, n entries of a run, M floats of an example's buffer.

One program owns some floats of one example's buffer. Runs come sorted by where they start, so those that reach its
floats follow each other: it reads just these parts of them, adds them up in registers, and writes once. No atomic adds:
the same batch gives the same bits. Each run is read once, and a tile's width more at its ends. The reference is the
torch path of accumulator.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_hash import TILE, RunStarts

TILE_RUNS, WARPS = 16, 4


def add_runs(buffer: Tensor, starts: RunStarts, runs: Tensor) -> None:
    """Adds each example's runs to the floats of its buffer that begin at their starts.

    Args:
        buffer: float32 [B, M], any stride between examples.
        starts: N of them, on the buffer's device.
        runs: float32 [B, N, n], entries of a run side by side.
    """
    (batch, size), (_, count, length) = buffer.shape, runs.shape
    if not batch * count * length:
        return
    assert buffer.stride(1) == 1
    assert len(starts) == count
    if runs.stride(2) != 1 and length > 1:
        runs = runs.contiguous()
    grid = (triton.cdiv(size, TILE), batch)
    _add_tile[grid](
        buffer,
        runs,
        starts.order,
        starts.in_order,
        starts.bounds(length, size),
        buffer.stride(0),
        runs.stride(0),
        runs.stride(1),
        size,
        length,
        TILE=tl.constexpr(TILE),
        RUNS=tl.constexpr(TILE_RUNS),
        num_warps=WARPS,  # pyright: ignore[reportCallIssue]
    )


@triton.jit
def _add_tile(
    buffer,
    runs,
    order,
    in_order,
    bounds,
    buffer_stride,
    example_stride,
    run_stride,
    size,
    length,
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
):
    tile = tl.program_id(0)
    example = tl.program_id(1).to(tl.int64)  # a batch may have more than 2^31 entries
    places = tile * TILE + tl.arange(0, TILE)
    first, last = tl.load(bounds + 2 * tile), tl.load(bounds + 2 * tile + 1)
    runs += example * example_stride
    total = tl.zeros((TILE,), dtype=tl.float32)
    for begin in range(first, last, RUNS):
        at = begin + tl.arange(0, RUNS)
        is_run = at < last
        entries = places[None, :] - tl.load(in_order + at, mask=is_run, other=0)[:, None]
        mask = is_run[:, None] & (entries >= 0) & (entries < length)
        which = tl.load(order + at, mask=is_run, other=0).to(tl.int64)
        total += tl.sum(tl.load(runs + which[:, None] * run_stride + entries, mask=mask, other=0.0), axis=0)
    out = buffer + example * buffer_stride + places
    inside = places < size
    tl.store(out, tl.load(out, mask=inside, other=0.0) + total, mask=inside)
