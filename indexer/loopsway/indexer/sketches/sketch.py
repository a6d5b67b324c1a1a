"""Adds per-example gradients into one sketch for each (example, step): TensorSketch and CountSketch, fused.

B examples, T tokens, S steps, I inputs, O outputs, W width, F = W/2 + 1 frequencies.

Every parameter of the loop body is sketched by its own hash into the same W buckets and the sketches are added
(Pham and Pagh 2013; Charikar, Chen and Farach-Colton 2002), so that inner products of two fused sketches estimate
the inner product of the whole gradients. An outer product sum_t g_t a_t^T is sketched by one of two paths that
agree to rounding:

- product: multiply g^T a out, tile by tile, and add its rows into their buckets. Costs T I O + I O, whatever W. The one
  path on which entries can be scaled.
- Fourier: FFT(sketch of g_t) * FFT(sketch of a_t), summed over t, one inverse FFT. Costs about T W log W.

This file knows no modules and no loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from ..config import LayerPath
from ..gradients.forms import Dense, Gradient, OuterProduct, TableRows
from .accumulator import RunAccumulator
from .device_hash import DeviceHash
from .exact import ExactGradients
from .planner import PathCost, choose_path, fourier_ns, product_ns, run_ns

__all__ = ["DeviceHash", "ExactGradients", "GradientSink", "Sketches"]

# Of float32 that a path may hold besides the sketches. More is slower, however much memory there is: beyond a few
# megabytes, allocators hand out fresh pages, which cost as much to touch as a product's entries to compute.
TILE_BYTES = 8 << 20
# Of a product: it stays in the cache until it is added. All rows of few examples multiply faster than few rows of all.
PRODUCT_BYTES = 4 << 20
DEVICE_PRODUCT_BYTES = 256 << 20  # on a GPU, which wants large products


class GradientSink(Protocol):
    """Where a backward pass drops its gradients."""

    @property
    def values(self) -> Any: ...  # one for each example; of sketches, float32 [B, S, W] or [B, S, P]

    def add(self, parameter: str, step: int, gradient: Gradient) -> None: ...


class Sketches:
    """Fused sketches of a batch. On the CPU, the same batch gives the same bits.

    Args:
        hashes: of each parameter, by name; made once by `DeviceHash.of_parameters`.
        batch: number of examples B.
        num_steps: S.
        width: W.
        layer_path: "auto" or a forced path.
        device: of the result.
        scales: factors of each gradient's entries, float32 of the parameter's shape, by name; what is not named is 1.

    Attributes:
        costs: what each parameter's gradients took so far, by name.

    Raises:
        ValueError: entries are to be scaled on the Fourier path.
    """

    def __init__(
        self,
        hashes: Mapping[str, DeviceHash],
        batch: int,
        num_steps: int,
        *,
        width: int,
        layer_path: LayerPath,
        device: torch.device,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        if scales and layer_path == "fourier":
            raise ValueError(
                'layer_path is "fourier", which never multiplies a gradient out and so can\'t scale its entries, as '
                'optimizer_aware=True asks for; use layer_path="auto" or "product"'
            )
        self.costs: dict[str, PathCost] = {}
        self._hashes, self._width, self._device = hashes, width, device
        self._layer_path: LayerPath = layer_path
        self._scales = {name: scale.reshape(hashes[name].shape) for name, scale in (scales or {}).items()}
        self._values = torch.zeros(batch, num_steps, width, device=device)  # [B, S, W]
        longest_run = max(hashed.longest_run for hashed in hashes.values())
        self._runs = RunAccumulator(batch, width, longest_run, device=device)
        self._running_step: int | None = None  # whose runs the accumulator holds

    @property
    def values(self) -> Tensor:
        """[B, S, W] float32."""
        self._drain()
        return self._values

    def add(self, parameter: str, step: int, gradient: Gradient) -> None:
        """Adds one use's gradient; cheapest when the steps come one after another."""
        if step != self._running_step:
            self._drain()
            self._running_step = step
        begin = time.perf_counter()
        path, expected_ns = self._add(parameter, step, gradient)
        measured_s = time.perf_counter() - begin if self._device.type == "cpu" else None
        cost = self.costs.setdefault(parameter, PathCost(path=path))
        cost.count(path, expected_ns * len(self._values), measured_s)

    def _drain(self) -> None:
        if self._running_step is not None:
            self._runs.drain(self._values[:, self._running_step])
            self._running_step = None

    def _add(self, parameter: str, step: int, gradient: Gradient) -> tuple[str, float]:
        """The path taken, and an example's nanoseconds as expected."""
        hashed, scale = self._hashes[parameter], self._scales.get(parameter)
        match gradient:
            case Dense(values, start):
                _add_dense(self._runs, values, start, hashed, scale)
                return "dense", run_ns(values.shape[1])
            case TableRows(rows, values):
                _add_table_rows(self._runs, rows, values, hashed, scale)
                return "rows", run_ns(values.shape[1] * values.shape[2])
            case OuterProduct(left, right):
                return self._add_outer_product(step, left, right, hashed, scale)

    def _add_outer_product(
        self, step: int, left: Tensor, right: Tensor, hashed: DeviceHash, scale: Tensor | None
    ) -> tuple[str, float]:
        (_, tokens, outputs), inputs = left.shape, right.shape[2]
        path = self._layer_path
        if path == "auto":
            # Of thousands of small FFTs a GPU only sees the launches: products took a fraction of their time there.
            chosen = scale is None and self._device.type == "cpu"
            path = choose_path(tokens, outputs, inputs, self._width) if chosen else "product"
        if path == "fourier":
            _add_by_fourier(self._values[:, step], left, right, hashed)
            return path, fourier_ns(tokens, outputs, inputs, self._width)
        _add_by_product(self._runs, left, right, hashed, scale)
        return path, product_ns(tokens, outputs, inputs)


def _add_dense(runs: RunAccumulator, values: Tensor, start: int, hashed: DeviceHash, scale: Tensor | None) -> None:
    """Adds entries start .. start + P' of the flattened parameter; whole rows if it has more than one."""
    if scale is not None:
        values = values * scale.flatten()[start : start + values.shape[1]]
    outputs, inputs = hashed.shape
    if outputs == 1:
        rows, begin, matrices = slice(None), start, values.unsqueeze(1)
    else:
        rows, begin, matrices = (
            slice(start // inputs, (start + values.shape[1]) // inputs),
            0,
            values.unflatten(1, (-1, inputs)),
        )
    end = begin + matrices.shape[2]
    matrices = matrices * hashed.column_signs[begin:end]  # [B, R, C]
    for segment, starts in zip(hashed.segments, hashed.starts, strict=True):
        first, last = max(segment.start, begin), min(segment.stop, end)
        if first < last:
            runs.add(starts.part(rows, first - segment.start), matrices[:, :, first - begin : last - begin])


def _add_table_rows(
    runs: RunAccumulator, rows: Tensor, values: Tensor, hashed: DeviceHash, scale: Tensor | None
) -> None:
    values = values * (hashed.column_signs if scale is None else hashed.column_signs * scale[rows])  # [B, T, D]
    for segment, starts in zip(hashed.segments, hashed.starts, strict=True):
        runs.add_apart(starts.starts[rows], values[:, :, segment])


def _add_by_product(
    runs: RunAccumulator, left: Tensor, right: Tensor, hashed: DeviceHash, scale: Tensor | None
) -> None:
    """Multiplies g^T a out for a tile of examples and rows at a time; a layer's [B, O, I] is never held at once."""
    (batch, _, outputs), inputs = left.shape, right.shape[2]
    most = PRODUCT_BYTES if left.device.type == "cpu" else min(DEVICE_PRODUCT_BYTES, 4 * batch * outputs * inputs)
    scratch = runs.scratch(most // 4)
    tile = min(outputs, max(1, len(scratch) // inputs))  # rows of a tile
    size = max(1, len(scratch) // (tile * inputs))  # examples of a tile
    for first in range(0, batch, size):
        examples = slice(first, min(first + size, batch))
        signed = right[examples] * hashed.column_signs
        for start in range(0, outputs, tile):
            rows = slice(start, min(start + tile, outputs))
            shape = (examples.stop - first, rows.stop - start, inputs)
            product = scratch[: math.prod(shape)].view(shape)  # [size, tile, I]
            torch.bmm(left[examples, :, rows].transpose(1, 2), signed, out=product)
            if scale is not None:
                product *= scale[rows]
            for segment, row_starts in zip(hashed.segments, hashed.starts, strict=True):
                runs.add(row_starts.part(rows), product[:, :, segment], examples)


def _add_by_fourier(out: Tensor, left: Tensor, right: Tensor, hashed: DeviceHash) -> None:
    batch, tokens, _ = left.shape
    width = hashed.width
    tile = max(1, TILE_BYTES // (16 * tokens * width))  # two sketches and two spectra of each token
    for start in range(0, batch, tile):
        examples = slice(start, start + tile)
        spectrum = _spectra(left[examples] * hashed.row_signs, hashed.rows, width)  # [tile, T, F]
        spectrum *= _spectra(right[examples] * hashed.column_signs, hashed.columns, width)
        out[examples] += torch.fft.irfft(spectrum.sum(1), n=width)


def _spectra(values: Tensor, buckets: Tensor, width: int) -> Tensor:
    """The FFT of each token's CountSketch; [B, T, D] gives [B, T, F]."""
    sketches = values.new_zeros(*values.shape[:2], width)
    sketches.index_add_(2, buckets, values)
    return torch.fft.rfft(sketches)
