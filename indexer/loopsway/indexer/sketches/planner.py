"""Prices the ways to sketch a gradient, picks a linear layer's, and keeps what each parameter took.

B examples, T tokens, I inputs, O outputs, W width.

Nanoseconds on one core of a 2023 x86 server, by tests/benchmarks/bench_planner.py. They are constants so that the same
index takes the same paths everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import LayerPath

MULTIPLY_ADD_NS = 0.015  # one multiply-add of a batched matmul
SCATTER_NS = 0.7  # one entry of a product, written and added to the sketch as part of a run
SIGN_NS = 0.25  # one entry of an activation multiplied by its column's sign
FFT_NS = 0.19  # one of W log2 W of a token's sketch, FFT and product
BUCKET_NS = 1.5  # one entry of a token added to its own bucket, before the FFT


@dataclass(kw_only=True)
class PathCost:
    """What one parameter's gradients took.

    Attributes:
        path: "product", "fourier", "rows" (of a table) or "dense"; several are joined by " + ".
        calls: gradients added.
        expected_ns: by the planner's prices.
        measured_s: seconds by the clock; None on a GPU, which works on after the call.
    """

    path: str
    calls: int = 0
    expected_ns: float = 0.0
    measured_s: float | None = None

    def count(self, path: str, expected_ns: float, measured_s: float | None) -> None:
        if path not in self.path.split(" + "):
            self.path += f" + {path}"
        self.calls += 1
        self.expected_ns += expected_ns
        if measured_s is not None:
            self.measured_s = (self.measured_s or 0.0) + measured_s


def choose_path(tokens: int, outputs: int, inputs: int, width: int) -> LayerPath:
    """The cheaper path of an outer product, by its shapes alone."""
    product = product_ns(tokens, outputs, inputs)
    return "product" if product <= fourier_ns(tokens, outputs, inputs, width) else "fourier"


def product_ns(tokens: int, outputs: int, inputs: int) -> float:
    """Of one example."""
    return tokens * inputs * SIGN_NS + outputs * inputs * (tokens * MULTIPLY_ADD_NS + SCATTER_NS)


def fourier_ns(tokens: int, outputs: int, inputs: int, width: int) -> float:
    """Of one example."""
    return tokens * (2 * width * (width.bit_length() - 1) * FFT_NS + (inputs + outputs) * BUCKET_NS)


def run_ns(entries: int) -> float:
    """Of entries that are there already: signs, then runs."""
    return entries * (SIGN_NS + SCATTER_NS)
