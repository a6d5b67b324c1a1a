"""What `loopsway reproduce scale` counts is what there is: stored bytes, memory that was held, exact influences."""

from __future__ import annotations

import sys

import pytest
import torch

from loopsway.experiments.accuracy import influences
from loopsway.experiments.looped_gpt import PreludeCodaTask, Shape
from loopsway.experiments.memory import Job, peaks
from loopsway.experiments.texts import synthetic_texts
from loopsway.experiments.ways import Way

SHAPE = Shape(dim=32, num_steps=3, num_bytes=8, batch=1)


@pytest.mark.parametrize("bits", [1, 8, 32])
def test_bytes_counted_of_ours_are_those_of_its_codes(bits: int) -> None:
    task, model = _model()
    way = Way(tool="ours", size=256, bits=bits)
    with way.opened(task, model) as call:
        coded = call(task.collate(["a text"]))
    held = sum(each.codes.nbytes + each.factors.nbytes + each.norms.nbytes for each in coded)
    assert held == _counted(way)


@pytest.mark.parametrize("size", [5, None])
def test_bytes_counted_of_the_reference_are_those_of_its_features(size: int | None) -> None:
    task, model = _model()
    way = Way(tool="reference", size=size)
    with way.opened(task, model) as call:
        features = call(task.collate(["a text"]))
    assert sum(each.nbytes for each in features.phi.values()) == _counted(way)


def test_bytes_counted_of_our_exact_gradients_are_those_that_come() -> None:
    task, model = _model()
    way = Way(tool="ours")
    with way.opened(task, model) as call:
        assert call(task.collate(["a text"])).nbytes == _counted(way)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peak_is_at_least_what_is_held_and_grows_with_the_batch() -> None:
    shape = Shape(dim=64, num_steps=8, num_bytes=8, batch=1)
    way = Way(tool="ours")
    found = peaks(Job(task="PreludeCodaTask", shape=shape, way=way, batches=(4, 8), threads=1)).later
    task = PreludeCodaTask(shape, ["a text"])
    sizes = [
        parameter.numel() for parameter in task.model(task.checkpoints()[0]).get_submodule("recurrent").parameters()
    ]
    example = way.example_bytes(len(sizes), sum(sizes), shape.num_steps)
    # Beside the gradients, activations of 8 bytes and one call's products: less than as much again.
    for batch, peak in found.items():
        assert batch * example <= peak < 2 * batch * example, (batch, peak, example)


def test_influences_of_long_gradients_are_right_to_float32() -> None:
    draw = torch.Generator().manual_seed(0)
    totals = torch.rand(2, 3_000_001, generator=draw)
    steps = torch.rand(1, 3, 3_000_001, generator=draw)
    truth = torch.einsum("np,qsp->nqs", totals.double(), steps.double())
    # All summands have one sign: what float32 loses while adding up doesn't cancel.
    torch.testing.assert_close(influences(totals, steps).double(), truth, rtol=1e-6, atol=0)


def _model(shape: Shape = SHAPE) -> tuple[PreludeCodaTask, torch.nn.Module]:
    task = PreludeCodaTask(shape, synthetic_texts(2))
    return task, task.model(task.checkpoints()[0])


def _counted(way: Way, shape: Shape = SHAPE) -> int:
    sizes = [parameter.numel() for parameter in _model(shape)[1].get_submodule("recurrent").parameters()]
    return way.example_bytes(len(sizes), sum(sizes), shape.num_steps)
