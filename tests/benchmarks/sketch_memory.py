"""Peak memory of sketching a batch, over the model and the batch, each way in a process of its own.

B examples, S steps, W width.

A peak is the process's high-water mark of resident memory during a run, less what was resident before: model, batch
and libraries, warmed by a plain step of one example. Freed memory goes back at once (MALLOC_MMAP_THRESHOLD_), so that
what is counted is what was held. Ours runs a model's first batch several times over, to learn how its calls are split
by example and to check itself, so its first batch has a peak of its own. Linux only.

Run as a program, this file is one such process; it prints JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from looped_gpt import gsm8k_folder, gsm8k_texts, synthetic_texts
from measurement import markdown_table
from sdi import FullGradientTracInSDI, ProjectedTracInSDI
from sketch_models import WORKLOADS, Workload, workload
from torch import Tensor

from loopsway.indexer import SketchConfig, StepSketcher
from loopsway.indexer.sketches.coding import code_examples

WAYS = ("plain", "ours", "sketched", "exact")  # the latter two: the reference's
TITLES = {
    "plain": "plain step",
    "ours": "ours",
    "ours, first": "ours, first batch",
    "sketched": "reference, m=2048",
    "exact": "reference, exact",
}
PROJECTION = 2048
NUM_TEXTS = 64  # repeated where a batch has more
MIB = 1 << 20
LIMIT_BYTES = 4 << 30
TARGET = 1.2  # of a plain step's peak, besides the sketches
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


Peaks = dict[int, int]  # bytes, by batch


def memory_tables(letters: Sequence[str], *, threads: int, verify: bool, smoke: bool) -> str:
    """The peaks against B; then the largest batch within the limit.

    Args:
        letters: of models.
        threads: of torch.
        verify: measure the largest batches too: they are told from a line through the peaks of two smaller ones.
        smoke: nothing is told.
    """
    rows, largest = [], []
    for letter in letters:
        chosen, found = workload(letter, smoke=smoke), {}
        for way in WAYS:
            found |= _in_own_process([letter, way, *["--verify"] * verify], threads=threads, smoke=smoke)
        rows += [_peak_row(chosen.sized(batch=batch), found) for batch in batches_of(letter, smoke=smoke)]
        sizes = {title: largest_batch(peaks) for title, peaks in found.items()}
        cells = [_largest_cell(sizes[title], found[title]) for title in TITLES]
        ratio = sizes["ours"] / max(1, sizes["exact"])
        largest.append((str(chosen).rpartition(", batch")[0], *cells, f"{ratio:.1f}"))
    header = ("model", *(f"{name}, MiB" for name in TITLES.values()), "sketches, MiB", "(ours - sketches) / plain")
    columns = (f"batch within {LIMIT_BYTES >> 30} GiB", *TITLES.values(), "ours / exact")
    return markdown_table(header, rows) + ("" if smoke else "\n\n" + markdown_table(columns, largest))


def batches_of(letter: str, *, smoke: bool) -> tuple[int, ...]:
    if smoke:
        return (1, 4)
    return (1, 2, 4) if WORKLOADS[letter].shape.num_steps > 16 else (4, 16, 32)


def largest_batch(peaks: Peaks) -> int:
    """Within the limit, by a line through the peaks of the two largest batches that were not made to verify it."""
    low, high = sorted(peaks)[1:3] if len(peaks) > 2 else sorted(peaks)
    slope = max(1.0, (peaks[high] - peaks[low]) / (high - low))
    return max(0, low + math.floor((LIMIT_BYTES - peaks[low]) / slope))


def _peak_row(chosen: Workload, found: dict[str, Peaks]) -> tuple[str, ...]:
    shape, width = chosen.shape, SketchConfig().width
    assert width is not None
    sketches = 4 * shape.batch * shape.num_steps * width
    ratio = (found["ours"][shape.batch] - sketches) / found["plain"][shape.batch]
    cells = (f"{found[title][shape.batch] / MIB:.0f}" for title in TITLES)
    return (str(chosen), *cells, f"{sketches / MIB:.0f}", f"{ratio:.2f}" + ("" if ratio <= TARGET else " (over 1.2)"))


def _largest_cell(batch: int, peaks: Peaks) -> str:
    return f"{batch} (measured: {peaks[batch] / (1 << 30):.2f} GiB)" if batch in peaks else str(batch)


def _in_own_process(arguments: Sequence[str], *, threads: int, smoke: bool) -> dict[str, Peaks]:
    command = [sys.executable, str(Path(__file__)), *arguments, "--threads", str(threads), *["--smoke"] * smoke]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **MALLOC})
    return {title: {int(batch): peak for batch, peak in each.items()} for title, each in json.loads(run.stdout).items()}


class Meter:
    """Measures one way on one workload in this process."""

    def __init__(self, chosen: Workload, way: str, texts: Sequence[str]) -> None:
        self._way, self._texts = way, texts
        self._task = chosen.task(texts)
        self._model = self._task.model(self._task.checkpoints()[0])
        self._plain(self._task.collate(texts[:1]))
        self.peaks: dict[str, Peaks] = {title: {} for title in ([way, f"{way}, first"] if way == "ours" else [way])}

    def measure(self, batch: int) -> None:
        examples = [self._texts[row % len(self._texts)] for row in range(batch)]
        tokens = self._task.collate(examples)
        self._model.zero_grad()
        _give_back()
        before = _resident("VmRSS")
        with self._call() as call:
            for peaks in reversed(self.peaks.values()):
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
                call(tokens)
                peaks[batch] = _resident("VmHWM") - before

    def _plain(self, tokens: Tensor) -> None:
        self._model.zero_grad()
        self._task.losses(self._model, tokens).sum().backward()

    @contextmanager
    def _call(self) -> Iterator[Callable[[Tensor], Any]]:
        if self._way == "plain":
            yield self._plain
            return
        if self._way == "ours":
            config = SketchConfig()
            sketcher = StepSketcher(self._model, self._task.loop, config)
            yield lambda tokens: code_examples(
                sketcher.sketch(self._task.losses, tokens), seed=config.seed, bits=config.bits
            )
            return
        body = self._model.get_submodule(self._task.body)
        if self._way == "sketched":
            estimator = ProjectedTracInSDI(model=self._model, target_modules=body, projection_size=PROJECTION)
        else:
            estimator = FullGradientTracInSDI(model=self._model, target_modules=body)
        yield lambda tokens: estimator.featurize_loader(loader=[tokens], loss_fn=self._task.losses)
        estimator.close()  # else its hooks keep it, and its features, alive


def _give_back() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(key: str) -> int:
    """In bytes: VmRSS, resident now; VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(key + ":"))
    return 1024 * int(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("letter", choices=WORKLOADS)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: 2)")
    parser.add_argument("--verify", action="store_true", help="measure the largest batch within the limit")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds whose figures mean nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
    folder = gsm8k_folder()
    texts = gsm8k_texts(folder, NUM_TEXTS) if folder else synthetic_texts(NUM_TEXTS)
    meter = Meter(workload(arguments.letter, smoke=arguments.smoke), arguments.way, texts)
    for batch in batches_of(arguments.letter, smoke=arguments.smoke):
        meter.measure(batch)
    if arguments.verify and not arguments.smoke:
        meter.measure(largest_batch(meter.peaks[arguments.way]))
    print(json.dumps(meter.peaks))


if __name__ == "__main__":
    main()
