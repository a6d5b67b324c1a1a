"""Adds per-example gradients into one sketch for each (example, step): TensorSketch and CountSketch, fused.

B examples, T tokens, S steps, I inputs, O outputs, W width, F = W/2 + 1 frequencies, P entries of all parameters.

Every parameter of the loop body is sketched by its own hash into the same W buckets and the sketches are added
(Pham and Pagh 2013; Charikar, Chen and Farach-Colton 2002), so that inner products of two fused sketches estimate
the inner product of the whole gradients. An outer product sum_t g_t a_t^T is sketched by one of two paths that
agree to rounding:

- product: multiply g^T a out, tile by tile, and add its entries into their buckets. Costs T I O + I O.
- Fourier: FFT(sketch of g_t) * FFT(sketch of a_t), summed over t, one inverse FFT. Costs about T W log W.

This file knows no modules and no loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from .config import LayerPath
from .gradients import Dense, Gradient, OuterProduct, TableRows
from .hashes import ParameterHash, matrix_shape, parameter_hash

TILE_BYTES = 64 << 20  # of float32 that a path may hold besides the sketches

# Nanoseconds on one core of a 2023 x86 server (tests/benchmarks/bench_planner.py): one multiply-add of a batched
# matmul; one entry added to its bucket; one of W log2 W of a token's sketch, FFT and product. They are constants so
# that the same index takes the same paths everywhere.
MULTIPLY_ADD_NS, SCATTER_NS, FFT_NS = 0.015, 1.55, 0.19


class GradientSink(Protocol):
    """Where a backward pass drops its gradients."""

    values: Tensor  # [B, S, W] or [B, S, P], float32

    def add(self, parameter: str, step: int, gradient: Gradient) -> None: ...


class Sketches:
    """Fused sketches of a batch.

    Args:
        hashes: of each parameter, by name; made once by `DeviceHash.of_parameters`.
        batch: number of examples B.
        num_steps: S.
        width: W.
        layer_path: "auto" or a forced path.
        device: of the result.
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
    ) -> None:
        self.values = torch.zeros(batch, num_steps, width, device=device)  # [B, S, W]
        self._hashes, self._width = hashes, width
        self._layer_path: LayerPath = layer_path

    def add(self, parameter: str, step: int, gradient: Gradient) -> None:
        out, hashed = self.values[:, step], self._hashes[parameter]  # [B, W]
        match gradient:
            case Dense(values):
                _add_entries(out, values.unflatten(1, hashed.shape), hashed, slice(None))
            case TableRows(rows, values):
                _add_table_rows(out, rows, values, hashed)
            case OuterProduct(left, right):
                if choose_path(left, right, self._width, self._layer_path) == "fourier":
                    _add_by_fourier(out, left, right, hashed)
                else:
                    _add_by_product(out, left, right, hashed)


class ExactGradients:
    """The gradients themselves, all parameters after one another: the exact counterpart of `Sketches`."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], batch: int, num_steps: int, *, device: torch.device
    ) -> None:
        self._shapes = {name: matrix_shape(shape) for name, shape in shapes.items()}
        self._starts, size = {}, 0
        for name, (rows, columns) in self._shapes.items():
            self._starts[name] = size
            size += rows * columns
        self.values = torch.zeros(batch, num_steps, size, device=device)  # [B, S, P]

    def add(self, parameter: str, step: int, gradient: Gradient) -> None:
        rows, columns = self._shapes[parameter]
        start = self._starts[parameter]
        out = self.values[:, step, start : start + rows * columns]
        match gradient:
            case Dense(values):
                out += values
            case TableRows(table_rows, values):
                index = table_rows.unsqueeze(-1) * columns + torch.arange(columns, device=out.device)
                out.scatter_add_(1, index.flatten(1), values.flatten(1))
            case OuterProduct(left, right):
                out += torch.bmm(left.transpose(1, 2), right).flatten(1)


def choose_path(left: Tensor, right: Tensor, width: int, layer_path: LayerPath) -> LayerPath:
    """The planner: the cheaper path for one layer's call, by its shapes alone."""
    if layer_path != "auto":
        return layer_path
    tokens, outputs, inputs = left.shape[1], left.shape[2], right.shape[2]
    product = outputs * inputs * (tokens * MULTIPLY_ADD_NS + SCATTER_NS)
    fourier = tokens * (2 * width * (width.bit_length() - 1) * FFT_NS + (inputs + outputs) * SCATTER_NS)
    return "product" if product <= fourier else "fourier"


class DeviceHash:
    """A parameter's hash as tensors."""

    @classmethod
    def of_parameters(
        cls, shapes: Mapping[str, tuple[int, ...]], *, width: int, seed: int, checkpoint: str, device: torch.device
    ) -> dict[str, DeviceHash]:
        """The hashes of parameters of these shapes, by name; `checkpoint` is part of their key."""
        return {
            name: cls(parameter_hash(seed, checkpoint, name, shape, width), device) for name, shape in shapes.items()
        }

    def __init__(self, hashed: ParameterHash, device: torch.device) -> None:
        self.rows = torch.from_numpy(hashed.row_buckets).to(device)
        self.row_signs = torch.from_numpy(hashed.row_signs).to(device)
        self.columns = torch.from_numpy(hashed.column_buckets).to(device)
        self.column_signs = torch.from_numpy(hashed.column_signs).to(device)
        self.width = hashed.width
        self.shape = (len(self.rows), len(self.columns))

    def buckets(self, rows: slice) -> Tensor:
        """The bucket of each entry of these rows, [R * C]."""
        return ((self.rows[rows, None] + self.columns) & (self.width - 1)).flatten()


def _add_entries(out: Tensor, signed: Tensor, hashed: DeviceHash, rows: slice) -> None:
    """Adds the entries [B, R, C] of these rows, without signs yet, into their buckets."""
    signed = signed * hashed.row_signs[rows, None] * hashed.column_signs
    out.index_add_(1, hashed.buckets(rows), signed.flatten(1))


def _add_table_rows(out: Tensor, rows: Tensor, values: Tensor, hashed: DeviceHash) -> None:
    signed = values * hashed.column_signs * hashed.row_signs[rows].unsqueeze(-1)  # [B, T, D]
    buckets = (hashed.rows[rows].unsqueeze(-1) + hashed.columns) & (hashed.width - 1)
    out.scatter_add_(1, buckets.flatten(1), signed.flatten(1))


def _add_by_product(out: Tensor, left: Tensor, right: Tensor, hashed: DeviceHash) -> None:
    """Multiplies g^T a out for a tile of rows at a time; the whole [B, O, I] of a layer is never held at once."""
    batch, _, outputs = left.shape
    left, right = left * hashed.row_signs, right * hashed.column_signs
    tile = max(1, TILE_BYTES // (4 * batch * right.shape[2]))
    for start in range(0, outputs, tile):
        rows = slice(start, start + tile)
        product = torch.bmm(left[:, :, rows].transpose(1, 2), right)  # [B, tile, I]
        out.index_add_(1, hashed.buckets(rows), product.flatten(1))


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
