"""Peak memory of a batch's gradients, over the model and the batch, each way in a process of its own.

B examples, S steps, W width.

A peak is the process's high-water mark of resident memory during a run, less what was resident before: model, batch
and libraries, warmed by a plain step of one example. Freed memory goes back at once (MALLOC_MMAP_THRESHOLD_), so that
what is counted is what was held. On a GPU it is that of torch's allocator. Ours runs a model's first batch several
times over, to learn how its calls are split by example and to check itself, so its first batch has a peak of its own.

Run as a program, this file is one such process: it reads a job and prints its peaks, both JSON.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .looped_gpt import GPTTask, PreludeCodaTask, Shape
from .texts import texts_at_hand
from .ways import Way, plain_step

TASKS = {task.__name__: task for task in (GPTTask, PreludeCodaTask)}
NUM_TEXTS = 64  # repeated where a batch has more
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
RESET = Path("/proc/self/clear_refs")  # takes the order to begin the high-water mark anew


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one process measures.

    Attributes:
        task: a name of TASKS.
        shape: of its model.
        way: to get gradients.
        batches: sizes B, one after the other.
        threads: of torch.
        device: a torch device name.
    """

    task: str
    shape: Shape
    way: Way
    batches: tuple[int, ...]
    threads: int
    device: str = "cpu"


@dataclass(frozen=True, kw_only=True)
class Peaks:
    """Bytes, by batch size.

    Attributes:
        first: of a model's first batch; of ours alone.
        later: of any other.
    """

    first: dict[int, int]
    later: dict[int, int]


def peaks(job: Job) -> Peaks:
    """Measures in a process of its own.

    Raises:
        OSError: the system does not say what its processes hold.
    """
    if job.device == "cpu" and not RESET.exists():
        raise OSError(f"peaks of memory are read from /proc, and this system has no {RESET}: run on Linux")
    torch.cuda.empty_cache()  # what this process holds unused is missing to the other; without a GPU, nothing
    run = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(asdict(job))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, **MALLOC},
    )
    found = json.loads(run.stdout)
    return Peaks(**{when: {int(batch): peak for batch, peak in each.items()} for when, each in found.items()})


class Meter:
    """Measures a job in this process."""

    def __init__(self, job: Job) -> None:
        self._texts, _ = texts_at_hand(NUM_TEXTS)
        self._way, self._device = job.way, torch.device(job.device)
        self._task = TASKS[job.task](job.shape, self._texts)
        self._model = self._task.model(self._task.checkpoints()[0]).to(self._device)
        plain_step(self._task, self._model, self._batch(1))
        self.peaks = Peaks(first={}, later={})

    def measure(self, size: int) -> None:
        batch = self._batch(size)
        self._model.zero_grad()
        gc.collect()
        before = self._held()
        with self._way.opened(self._task, self._model) as call:
            for found in (self.peaks.first, self.peaks.later) if self._way.tool == "ours" else (self.peaks.later,):
                self._begin_anew()
                call(batch)
                found[size] = self._peak() - before

    def _batch(self, size: int) -> Tensor:
        examples = [self._texts[row % len(self._texts)] for row in range(size)]
        return self._task.collate(examples).to(self._device)

    def _held(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        return _resident("VmRSS")

    def _begin_anew(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            RESET.write_text("5")

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _resident("VmHWM")


def _resident(key: str) -> int:
    """In bytes: VmRSS, resident now; VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (value,) = (line.split()[1] for line in lines if line.startswith(key + ":"))
    return 1024 * int(value)


def main() -> None:
    order = json.loads(sys.argv[1])
    job = Job(**{**order, "shape": Shape(**order["shape"]), "way": Way(**order["way"])})
    torch.set_num_threads(job.threads)
    meter = Meter(job)
    for size in job.batches:
        meter.measure(size)
    print(json.dumps(asdict(meter.peaks)))


if __name__ == "__main__":
    main()
