"""What is measured of each way on the paper's shape: time, memory, stored bytes and error.

d model dimension, B examples in a batch, N examples, S steps, T bytes, W width, m the reference's floats for each
parameter tensor.

Time is that of one batch, in turns in one process on one thread, in multiples of a plain forward and backward of all
parameters; ours has rotation and coding in it. Memory is that of `memory.py`, error that of `accuracy.py`.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loopsway.indexer import SketchConfig
from loopsway.indexer.progress import BuildProgress

from .accuracy import SelfInfluence
from .looped_gpt import PreludeCodaTask, Shape
from .memory import Job, peaks
from .reference import DEFAULT_PROJECTION
from .timing import median_seconds
from .ways import Way

DEFAULT = SketchConfig()
PLAIN, EXACT = Way(tool="plain"), Way(tool="reference")
OURS = Way(tool="ours", size=DEFAULT.width, bits=DEFAULT.bits)
THEIRS = Way(tool="reference", size=DEFAULT_PROJECTION)
WEIGHED = (PLAIN, OURS, THEIRS, EXACT)  # whose memory is measured: each takes a process


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How much is measured.

    Attributes:
        dims: d of the models.
        num_steps: S.
        num_bytes: T.
        batch: B.
        training_steps: before gradients are taken.
        num_examples: N.
        num_draws: of the hashes.
        repeats: of each timing.
        codes: our W and bits.
        projections: the reference's m. Besides its default they give just more bytes than one of ours.
    """

    dims: tuple[int, ...]
    num_steps: int = 32
    num_bytes: int = 128
    batch: int
    training_steps: int
    num_examples: int
    num_draws: int
    repeats: int = 3
    codes: tuple[tuple[int, int], ...] = ((8192, 1), (8192, 32), (65536, 32))
    projections: tuple[int, ...] = (6, 177, DEFAULT_PROJECTION)

    @property
    def ways(self) -> list[Way]:
        ours = [Way(tool="ours", size=width, bits=bits) for width, bits in self.codes]
        theirs = [Way(tool="reference", size=projection) for projection in self.projections]
        return [PLAIN, *ours, *theirs, EXACT]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way on one model.

    Attributes:
        dim: d.
        way: to get gradients.
        seconds: of a batch, the median.
        time: of a batch, in plain steps.
        peak_bytes: over model and batch; None where it was not measured.
        first_peak_bytes: of a model's first batch; of ours alone.
        example_bytes: what is stored of an example.
        errors: relative, one for each draw; of the reference's exact gradients, their distance from ours.
    """

    dim: int
    way: Way
    seconds: float
    time: float
    peak_bytes: int | None
    first_peak_bytes: int | None
    example_bytes: int
    errors: Sequence[float] = field(default=())

    @property
    def error(self) -> float:
        return statistics.mean(self.errors)

    def cells(self) -> dict[str, Any]:
        """For a table."""
        return {
            "dim": self.dim,
            "way": str(self.way),
            "tool": self.way.tool,
            "size": self.way.size,
            "bits": self.way.bits,
            "seconds": self.seconds,
            "time_in_plain_steps": self.time,
            "peak_bytes": self.peak_bytes,
            "first_peak_bytes": self.first_peak_bytes,
            "example_bytes": self.example_bytes,
            "errors": list(self.errors),
        }


def measured_rows(setting: Setting, dim: int, texts: Sequence[str], device: str, bars: BuildProgress) -> list[Row]:
    """Of a model that is trained a little on the first of the texts; the examples are the last of them."""
    bars.begin(f"d = {dim}", 3)
    shape = Shape(dim=dim, num_steps=setting.num_steps, num_bytes=setting.num_bytes, batch=setting.batch)
    task = PreludeCodaTask(shape, texts, training_steps=setting.training_steps)
    model = task.model(task.checkpoints()[0]).to(device)
    examples = texts[-setting.num_examples :]
    batches = [task.collate(part).to(device) for part in _in_batches(examples, setting.batch)]
    errors, sizes = _errors(setting, task, model, batches)
    bars.advance()
    seconds = _seconds(setting, task, model, batches[0])
    bars.advance()
    held: dict[Way, tuple[int, int | None]] = {}
    for way in WEIGHED:
        job = Job(task="PreludeCodaTask", shape=shape, way=way, batches=(shape.batch,), threads=1, device=device)
        found = peaks(job)
        held[way] = found.later[shape.batch], found.first.get(shape.batch)
    bars.advance()
    return [
        Row(
            dim=dim,
            way=way,
            seconds=seconds[way],
            time=seconds[way] / seconds[PLAIN],
            peak_bytes=held.get(way, (None, None))[0],
            first_peak_bytes=held.get(way, (None, None))[1],
            example_bytes=way.example_bytes(len(sizes), sum(sizes), setting.num_steps),
            errors=errors.get(way, ()),
        )
        for way in setting.ways
    ]


def _in_batches(examples: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (examples[start : start + size] for start in range(0, len(examples), size))


def _errors(
    setting: Setting, task: PreludeCodaTask, model: nn.Module, batches: Sequence[Tensor]
) -> tuple[dict[Way, list[float]], list[int]]:
    """Of sketches, one for each draw, and of the reference's exact gradients; and the sizes of the loop's tensors."""
    few = batches[0][:2]
    influence = SelfInfluence(task, model, task.body, batches, few)
    errors: dict[Way, list[float]] = {way: [] for way in setting.ways if way.size is not None}
    bits_of = {width: [bits for other, bits in setting.codes if other == width] for width, _ in setting.codes}
    for draw in range(setting.num_draws):
        for width, bits in bits_of.items():
            for each, error in influence.our_errors(width, bits, draw).items():
                errors[Way(tool="ours", size=width, bits=each)].append(error)
        for projection in setting.projections:
            errors[Way(tool="reference", size=projection)].append(influence.reference_error(projection, draw))
    first = SelfInfluence(task, model, task.body, batches[:1], few)  # all of the reference's may not fit in memory
    errors[EXACT] = [first.reference_error(None)]
    return errors, [math.prod(shape) for shape in influence.shapes.values()]


def _seconds(setting: Setting, task: PreludeCodaTask, model: nn.Module, batch: Tensor) -> dict[Way, float]:
    """Of each way on a batch, the median."""
    with ExitStack() as stack:
        calls = {}
        for way in setting.ways:  # each on its own model: the reference's hooks would slow the others
            call = stack.enter_context(way.opened(task, copy.deepcopy(model)))
            calls[str(way)] = partial(call, batch)
        wait = partial(torch.cuda.synchronize, batch.device) if batch.is_cuda else None
        seconds = median_seconds(calls, setting.repeats, wait)
    return {way: seconds[str(way)] for way in setting.ways}
