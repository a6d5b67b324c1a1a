"""The product path on a GPU, in Triton: a gradient is multiplied out in registers and never reaches memory.

B examples, T tokens, I inputs, O outputs, W width.

One program multiplies a tile of g^T a out, summed over all tokens, and adds it to its example's sketch by atomic adds,
whose order is not fixed: two runs differ by rounding. Columns of a hash are contiguous, so a warp's adds to a row are
to consecutive floats. The reference is the torch path of sketch.py. Tested by Triton's interpreter on a CPU; its speed
has not been measured on a GPU, and its tile sizes are a guess.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_hash import DeviceHash

TILE_ROWS, TILE_COLUMNS, TILE_TOKENS = 64, 64, 32


def add_product(out: Tensor, left: Tensor, right: Tensor, hashed: DeviceHash, scale: Tensor | None = None) -> None:
    """Adds the sketch of left^T right, its entries times scale, to each example's sketch.

    Args:
        out: [B, W], any stride between examples.
        left: [B, T, O] output gradients, float32.
        right: [B, T, I] inputs, float32.
        hashed: of the parameter.
        scale: [O, I], or None for ones.
    """
    left, right = left.contiguous(), right.contiguous()
    (batch, tokens, outputs), inputs = left.shape, right.shape[2]
    assert out.stride(1) == 1
    grid = (triton.cdiv(inputs, TILE_COLUMNS), triton.cdiv(outputs, TILE_ROWS), batch)
    _add_tile[grid](
        out,
        left,
        right,
        hashed.rows,
        hashed.row_signs,
        hashed.columns,
        hashed.column_signs,
        right if scale is None else scale.contiguous(),  # without a scale, not read
        out.stride(0),
        tokens,
        outputs,
        inputs,
        WIDTH=tl.constexpr(hashed.width),
        SCALED=tl.constexpr(scale is not None),
        ROWS=tl.constexpr(TILE_ROWS),
        COLUMNS=tl.constexpr(TILE_COLUMNS),
        TOKENS=tl.constexpr(TILE_TOKENS),
    )


@triton.jit
def _add_tile(
    out,
    left,
    right,
    row_buckets,
    row_signs,
    column_buckets,
    column_signs,
    scale,
    out_stride,
    tokens,
    outputs,
    inputs,
    WIDTH: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    example = tl.program_id(2).to(tl.int64)  # a batch may have more than 2^31 entries
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = rows < outputs, columns < inputs
    left += example * tokens * outputs
    right += example * tokens * inputs

    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for begin in range(0, tokens, TOKENS):
        at = begin + tl.arange(0, TOKENS)
        is_token = at < tokens
        g = tl.load(left + rows[:, None] + at[None, :] * outputs, mask=is_row[:, None] & is_token[None, :], other=0.0)
        a = tl.load(
            right + at[:, None] * inputs + columns[None, :], mask=is_token[:, None] & is_column[None, :], other=0.0
        )
        product = tl.dot(g, a, product, input_precision="ieee")

    mask = is_row[:, None] & is_column[None, :]
    signs = tl.load(row_signs + rows, mask=is_row, other=0.0)[:, None]
    product *= signs * tl.load(column_signs + columns, mask=is_column, other=0.0)[None, :]
    if SCALED:
        product *= tl.load(scale + rows[:, None].to(tl.int64) * inputs + columns[None, :], mask=mask, other=0.0)
    buckets = tl.load(row_buckets + rows, mask=is_row, other=0)[:, None]
    buckets = (buckets + tl.load(column_buckets + columns, mask=is_column, other=0)[None, :]) & (WIDTH - 1)
    tl.atomic_add(out + example * out_stride + buckets, product, mask=mask, sem="relaxed")
