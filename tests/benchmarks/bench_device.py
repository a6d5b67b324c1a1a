"""Sketching on a GPU: in plain steps of the same batch, beside the reference; and the product kernel against its limit.

    python tests/benchmarks/bench_device.py [--device cuda] [--smoke]

A plain step is one forward and backward that gives every parameter's gradient of the summed losses. "TF32" lets torch
round matrix products' inputs to 11 bits, "bfloat16" is autocast of forward and backward, both in the plain step as in
ours. The kernel's limit is torch's product alone (bmm) at the same precision, which gives gradients that are not yet
sketched. Times are by the wall around synchronized calls, medians in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_search import BATCHES, K, code_blocks, draw, right_ids, stored_slot
from measurement import markdown_table
from sdi import ProjectedTracInSDI
from sketch_models import WORKLOADS, Workload
from torch import Tensor, nn

from loopsway.experiments.looped_gpt import Shape
from loopsway.experiments.texts import synthetic_texts
from loopsway.experiments.timing import median_seconds
from loopsway.indexer import SketchConfig, StepSketcher
from loopsway.indexer.gradients.forms import OuterProduct
from loopsway.indexer.sketches.coding import code_examples
from loopsway.indexer.sketches.sketch import DeviceHash, Sketches

PRECISIONS = ("float32", "TF32", "bfloat16")
# Batch, tokens, outputs, inputs.
LAYERS = ((16, 128, 1024, 256), (16, 512, 1024, 1024), (8, 1024, 4096, 1024), (4, 1024, 8192, 2048))
SMOKE_LAYERS = ((2, 8, 16, 8),)


def models(*, smoke: bool) -> list[Workload]:
    if smoke:
        return [WORKLOADS["a"].smoke()]
    large = replace(WORKLOADS["b"], shape=Shape(dim=1024, num_bytes=512, num_steps=8, batch=16))
    return [
        WORKLOADS["a"].sized(batch=64),
        WORKLOADS["b"].sized(batch=64),
        WORKLOADS["c"].sized(batch=16),
        WORKLOADS["e"].sized(batch=64),
        large,
    ]


@contextlib.contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "TF32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Timer:
    """Medians of calls in turns, on one device."""

    device: torch.device
    repeats: int

    def medians(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        return median_seconds(calls, self.repeats, self._wait)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def model_rows(workload: Workload, device: torch.device, timer: Timer) -> list[list[str]]:
    task = workload.task(synthetic_texts(workload.shape.batch))
    model = copy.deepcopy(task.model(task.checkpoints()[0])).to(device)
    batch = task.collate(list(task.examples())).to(device)
    rows = []
    for name in PRECISIONS:
        with precision(name):
            rows.append([str(workload), name, *model_cells(task, model, batch, timer, half=name == "bfloat16")])
    return rows


def model_cells(task: Any, model: nn.Module, batch: Tensor, timer: Timer, *, half: bool) -> list[str]:
    def losses(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, dtype=torch.bfloat16, enabled=half):
            return task.losses(model, batch)

    def plain() -> None:
        model.zero_grad()
        losses(model, batch).sum().backward()

    config = SketchConfig()
    sketcher = StepSketcher(model, task.loop, config)
    finished = sketcher.sketch(losses, batch)
    other = copy.deepcopy(model)
    reference = ProjectedTracInSDI(model=other, target_modules=other.get_submodule(task.body), projection_size=2048)
    calls: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "sketches": partial(sketcher.sketch, losses, batch),
        "coding": partial(code_examples, finished, seed=0, bits=1),
    }
    if not half:
        calls["reference"] = partial(reference.featurize_loader, loader=[batch], loss_fn=losses)
    try:
        seconds = timer.medians(calls)
    except (RuntimeError, ValueError) as error:  # the reference ran out of memory, or refuses
        print("without the reference:", str(error).splitlines()[0])
        calls.pop("reference", None)
        seconds = timer.medians(calls)
    plain_s = seconds["plain"]
    ours = seconds["sketches"] + seconds["coding"]
    theirs = seconds.get("reference")
    return [
        f"{1e3 * plain_s:.1f}",
        f"{seconds['sketches'] / plain_s:.2f}",
        f"{seconds['coding'] / plain_s:.2f}",
        f"{len(batch) / ours:,.0f}",
        "" if theirs is None else f"{theirs / plain_s:.2f}",
        "" if theirs is None else f"{theirs / ours:.1f}",
        *memory_cells(calls),
    ]


def memory_cells(calls: Mapping[str, Callable[[], Any]]) -> list[str]:
    """Peaks of a plain step's and our memory above what there is before, MiB."""
    if not torch.cuda.is_available():
        return ["", ""]
    cells = []
    for name in ("plain", "sketches"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        calls[name]()
        torch.cuda.synchronize()
        cells.append(f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}")
    return cells


def kernel_rows(layer: tuple[int, int, int, int], width: int, device: torch.device, timer: Timer) -> list[list[str]]:
    batch, tokens, outputs, inputs = layer
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(batch, tokens, size, generator=generator).to(device) for size in (outputs, inputs))
    hashes = DeviceHash.of_parameters({"w": (outputs, inputs)}, width=width, seed=0, checkpoint="a", device=device)
    gradient = OuterProduct(left, right)
    exact = Sketches(hashes, batch, 1, width=width, layer_path="product", device=device)
    exact._runs._has_kernel = False
    exact.add("w", 0, OuterProduct(left, right))
    want = exact.values.clone()
    rows = []
    for name in PRECISIONS[:2]:
        with precision(name):
            calls: dict[str, Callable[[], Any]] = {"bmm": lambda: torch.bmm(left.transpose(1, 2), right)}
            errors = {}
            for way, has_kernel in (("kernel", True), ("torch", False)):
                sketches = Sketches(hashes, batch, 1, width=width, layer_path="product", device=device)
                sketches._runs._has_kernel &= has_kernel
                sketches.add("w", 0, gradient)
                errors[way] = float((sketches.values - want).norm() / want.norm())
                calls[way] = partial(sketches.add, "w", 0, gradient)
            seconds = timer.medians(calls)
        flops = 2 * batch * tokens * outputs * inputs
        rows.append(
            [
                f"{batch} x {tokens} tokens, {outputs} x {inputs}",
                name,
                f"{1e3 * seconds['bmm']:.2f} ({flops / seconds['bmm'] / 1e12:.0f})",
                *(f"{seconds[way] / seconds['bmm']:.2f} ({errors[way]:.0e})" for way in ("kernel", "torch")),
            ]
        )
    return rows


def search_rows(count: int, width: int, bits: int, device: torch.device, timer: Timer) -> list[list[str]]:
    """Of exact searches of a slot whose codes are on the device, of both signs; torch's of one sign, and rounded."""
    with tempfile.TemporaryDirectory() as folder:
        slot = stored_slot(Path(folder), count, width, bits, device.type)
        codes = torch.from_numpy(np.concatenate([block.view(np.uint8) for block in code_blocks(slot)])).to(device)
        rows = torch.cat([torch.from_numpy(block).to(device).bfloat16() for block in slot.blocks()])
        words = codes.view(torch.int64)
        cells = []
        for batch in BATCHES:
            queries = draw(batch, width)
            there = torch.from_numpy(queries).to(device).bfloat16()
            seconds = timer.medians(
                {
                    "read": lambda: words.sum(),
                    "ours": partial(slot.search, queries, K),
                    "torch": lambda there=there: [each.cpu() for each in (there @ rows.T).topk(K, 1)],
                }
            )
            cells.append(f"{1e3 * seconds['ours']:.2f} ({1e3 * seconds['torch']:.2f}; {1e3 * seconds['read']:.2f})")
        return [[f"{count:,} x {width:,}, {bits} bits", *cells, str(right_ids(slot, draw(4, width)))]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--part", choices=("kernel", "models", "search"), action="append")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds whose figures mean nothing")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    parts = arguments.part or ["kernel", "models", "search"]
    timer = Timer(device, 1 if arguments.smoke else arguments.repeats)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device), "torch", torch.__version__)
    if "kernel" in parts:
        header = ["layer", "precision", "bmm, ms (TFLOP/s)", "kernel / bmm (error)", "torch path / bmm (error)"]
        layers, width = (SMOKE_LAYERS, 64) if arguments.smoke else (LAYERS, 8192)
        print(markdown_table(header, [row for layer in layers for row in kernel_rows(layer, width, device, timer)]))
    if "models" in parts:
        header = [
            "model", "precision", "plain, ms", "sketches / plain", "coding / plain", "examples/s",
            "reference, m=2048 / plain", "reference / ours", "plain, MiB", "ours, MiB",
        ]  # fmt: skip
        print("\n" + markdown_table(header, []), flush=True)
        for workload in models(smoke=arguments.smoke):
            for row in model_rows(workload, device, timer):
                print(f"| {' | '.join(row)} |", flush=True)
    if "search" in parts:
        header = ["rows", *(f"{batch} queries, ms (torch bfloat16; a read)" for batch in BATCHES), "ids right"]
        slots = ((300, 64, 1),) if arguments.smoke else ((100_000, 8192, 1), (100_000, 1024, 16), (400_000, 1024, 1))
        print("\n" + markdown_table(header, [row for slot in slots for row in search_rows(*slot, device, timer)]))


if __name__ == "__main__":
    main()
