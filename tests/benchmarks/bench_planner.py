"""Measures the planner's three constants on this machine, and how good its choices are.

    python tests/benchmarks/bench_planner.py [--smoke]

The planner of loopsway.indexer.sketch prices a linear layer's two paths, product and Fourier, with MULTIPLY_ADD_NS,
SCATTER_NS and FFT_NS. The first table gives each one's value for several shapes and the median, which is the value to
suggest. The second times both paths through `Sketches` and shows what the choice cost over the better one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from measurement import markdown_table, median_seconds, parse_arguments

from loopsway.indexer import sketch
from loopsway.indexer.config import LayerPath
from loopsway.indexer.gradients import OuterProduct

BATCH = 8
# Tokens, outputs, inputs.
LAYERS = ((16, 192, 64), (96, 384, 128), (96, 512, 128), (128, 1024, 256), (128, 256, 1024), (256, 1536, 512))
WIDTHS = (1024, 8192, 65536)
SMOKE_LAYERS, SMOKE_WIDTHS = ((4, 16, 8),), (256,)


def multiply_add_ns(tokens: int, outputs: int, inputs: int, repeats: int) -> float:
    left, right = torch.randn(BATCH, tokens, outputs), torch.randn(BATCH, tokens, inputs)
    seconds = median_seconds({"": lambda: torch.bmm(left.transpose(1, 2), right)}, repeats)[""]
    return seconds * 1e9 / (BATCH * tokens * outputs * inputs)


def scatter_ns(outputs: int, inputs: int, width: int, repeats: int) -> float:
    """What the product path costs beyond its multiply-adds, for each entry: one token, so that those are few."""
    call = _adding(1, outputs, inputs, width, "product")
    return median_seconds({"": call}, repeats)[""] * 1e9 / (BATCH * outputs * inputs)


def fft_ns(tokens: int, width: int, repeats: int) -> float:
    """Half of what the Fourier path costs for each token, for each of W log2 W: sketches and their product included."""
    call = _adding(tokens, 1, 1, width, "fourier")
    return median_seconds({"": call}, repeats)[""] * 1e9 / (2 * BATCH * tokens * width * (width.bit_length() - 1))


def constants(layers: tuple[tuple[int, int, int], ...], widths: tuple[int, ...], repeats: int) -> str:
    found = {
        "MULTIPLY_ADD_NS": [multiply_add_ns(*layer, repeats) for layer in layers],
        "SCATTER_NS": [scatter_ns(*layer[1:], width, repeats) for layer in layers for width in widths],
        "FFT_NS": [fft_ns(tokens, width, repeats) for tokens, _, _ in layers for width in widths],
    }
    rows = []
    for name, values in found.items():
        median, spread = statistics.median(values), f"{min(values):.3f} to {max(values):.3f}"
        rows.append((name, f"{getattr(sketch, name):g}", f"{median:.3g}", spread))
    return markdown_table(("constant", "in sketch.py", "suggested", "measured"), rows)


def choices(layers: tuple[tuple[int, int, int], ...], widths: tuple[int, ...], repeats: int) -> str:
    rows = []
    for tokens, outputs, inputs in layers:
        for width in widths:
            paths: tuple[LayerPath, ...] = ("product", "fourier")
            calls = {path: _adding(tokens, outputs, inputs, width, path) for path in paths}
            milliseconds = {path: 1e3 * seconds for path, seconds in median_seconds(calls, repeats).items()}
            left, right = torch.empty(BATCH, tokens, outputs), torch.empty(BATCH, tokens, inputs)
            chosen = sketch.choose_path(left, right, width, "auto")
            regret = milliseconds[chosen] / min(milliseconds.values())
            timed = (f"{milliseconds[path]:.1f}" for path in paths)
            rows.append((f"{tokens} x {outputs} x {inputs}", str(width), *timed, chosen, f"{regret:.2f}"))
    header = ("T x O x I", "W", "product, ms", "Fourier, ms", "chosen", "chosen / better")
    return markdown_table(header, rows)


def _adding(tokens: int, outputs: int, inputs: int, width: int, path: LayerPath) -> Callable[[], None]:
    """Adds one layer's gradients of a batch to its sketches."""
    shapes, device = {"weight": (outputs, inputs)}, torch.device("cpu")
    hashes = sketch.DeviceHash.of_parameters(shapes, width=width, seed=0, checkpoint="any", device=device)
    sketches = sketch.Sketches(hashes, BATCH, 1, width=width, layer_path=path, device=device)
    gradient = OuterProduct(torch.randn(BATCH, tokens, outputs), torch.randn(BATCH, tokens, inputs))
    return partial(sketches.add, "weight", 0, gradient)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = parse_arguments(parser)
    layers, widths = (SMOKE_LAYERS, SMOKE_WIDTHS) if arguments.smoke else (LAYERS, WIDTHS)
    print(constants(layers, widths, arguments.repeats), flush=True, end="\n\n")
    print(choices(layers, widths, arguments.repeats))


if __name__ == "__main__":
    main()
