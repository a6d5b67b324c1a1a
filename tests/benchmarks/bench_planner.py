"""Measures the planner's constants on this machine, how good its choices are, and what each path costs.

    python tests/benchmarks/bench_planner.py [--smoke]

sketches/planner.py prices a linear layer's two paths, product and Fourier, with constants in nanoseconds. The
first table gives each one's value for several shapes and the median, which is the value to suggest. The second times
both paths through `Sketches`, beside the matrix product alone (bmm), and shows what the planner's choice cost over the
better one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from measurement import markdown_table, parse_arguments

from loopsway.experiments.timing import median_seconds
from loopsway.indexer.config import LayerPath
from loopsway.indexer.gradients.forms import OuterProduct
from loopsway.indexer.sketches import planner
from loopsway.indexer.sketches.sketch import DeviceHash, Sketches

BATCH = 8
# Tokens, outputs, inputs.
LAYERS = ((16, 192, 64), (96, 384, 128), (96, 512, 128), (128, 1024, 256), (128, 256, 1024), (256, 1536, 512))
WIDTHS = (1024, 8192, 65536)
SMOKE_LAYERS, SMOKE_WIDTHS = ((4, 16, 8),), (256,)

Layer = tuple[int, int, int]


def multiply_add_ns(layer: Layer, repeats: int) -> float:
    tokens, outputs, inputs = layer
    return _nanoseconds(_multiplying(layer), repeats) / (BATCH * tokens * outputs * inputs)


def scatter_ns(layer: Layer, width: int, repeats: int) -> float:
    """What the product path costs beyond its multiply-adds, for each entry: one token, so that those are few."""
    _, outputs, inputs = layer
    return _nanoseconds(_adding((1, outputs, inputs), width, "product"), repeats) / (BATCH * outputs * inputs)


def sign_ns(layer: Layer, repeats: int) -> float:
    tokens, _, inputs = layer
    right, signs = torch.randn(BATCH, tokens, inputs), torch.ones(inputs)
    return _nanoseconds(lambda: right * signs, repeats) / right.numel()


def fft_ns(tokens: int, width: int, repeats: int) -> float:
    """Half of what the Fourier path costs for each token, for each of W log2 W: sketches and their product included."""
    call = _adding((tokens, 1, 1), width, "fourier")
    return _nanoseconds(call, repeats) / (2 * BATCH * tokens * width * (width.bit_length() - 1))


def bucket_ns(layer: Layer, width: int, repeats: int) -> float:
    tokens, outputs, _ = layer
    sketches, values = torch.zeros(BATCH, tokens, width), torch.randn(BATCH, tokens, outputs)
    buckets = torch.randint(0, width, (outputs,))
    return _nanoseconds(lambda: sketches.index_add_(2, buckets, values), repeats) / values.numel()


def constants(layers: tuple[Layer, ...], widths: tuple[int, ...], repeats: int) -> str:
    found = {
        "MULTIPLY_ADD_NS": [multiply_add_ns(layer, repeats) for layer in layers],
        "SCATTER_NS": [scatter_ns(layer, width, repeats) for layer in layers for width in widths],
        "SIGN_NS": [sign_ns(layer, repeats) for layer in layers],
        "FFT_NS": [fft_ns(tokens, width, repeats) for tokens, _, _ in layers for width in widths],
        "BUCKET_NS": [bucket_ns(layer, widths[0], repeats) for layer in layers],
    }
    rows = []
    for name, values in found.items():
        median, spread = statistics.median(values), f"{min(values):.3f} to {max(values):.3f}"
        rows.append((name, f"{getattr(planner, name):g}", f"{median:.3g}", spread))
    return markdown_table(("constant", "in planner.py", "suggested", "measured"), rows)


def choices(layers: tuple[Layer, ...], widths: tuple[int, ...], repeats: int) -> str:
    rows = []
    for layer in layers:
        for width in widths:
            paths: tuple[LayerPath, ...] = ("product", "fourier")
            calls = {"bmm": _multiplying(layer)} | {path: _adding(layer, width, path) for path in paths}
            milliseconds = {name: 1e3 * seconds for name, seconds in median_seconds(calls, repeats).items()}
            chosen = planner.choose_path(*layer, width)
            regret = milliseconds[chosen] / min(milliseconds[path] for path in paths)
            timed = (f"{milliseconds[name]:.1f}" for name in calls)
            ratio = f"{milliseconds['product'] / milliseconds['bmm']:.2f}"
            rows.append((" x ".join(map(str, layer)), str(width), *timed, ratio, chosen, f"{regret:.2f}"))
    header = ("T x O x I", "W", "bmm, ms", "product, ms", "Fourier, ms", "product / bmm", "chosen", "chosen / better")
    return markdown_table(header, rows)


def _multiplying(layer: Layer) -> Callable[[], object]:
    tokens, outputs, inputs = layer
    left, right = torch.randn(BATCH, tokens, outputs), torch.randn(BATCH, tokens, inputs)
    return lambda: torch.bmm(left.transpose(1, 2), right)


def _adding(layer: Layer, width: int, path: LayerPath) -> Callable[[], None]:
    """Adds one layer's gradients of a batch to its sketches."""
    tokens, outputs, inputs = layer
    shapes, device = {"weight": layer[1:]}, torch.device("cpu")
    hashes = DeviceHash.of_parameters(shapes, width=width, seed=0, checkpoint="any", device=device)
    sketches = Sketches(hashes, BATCH, 1, width=width, layer_path=path, device=device)
    gradient = OuterProduct(torch.randn(BATCH, tokens, outputs), torch.randn(BATCH, tokens, inputs))
    return partial(sketches.add, "weight", 0, gradient)


def _nanoseconds(call: Callable[[], object], repeats: int) -> float:
    return median_seconds({"": call}, repeats)[""] * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = parse_arguments(parser)
    layers, widths = (SMOKE_LAYERS, SMOKE_WIDTHS) if arguments.smoke else (LAYERS, WIDTHS)
    print(constants(layers, widths, arguments.repeats), flush=True, end="\n\n")
    print(choices(layers, widths, arguments.repeats))


if __name__ == "__main__":
    main()
