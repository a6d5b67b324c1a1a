"""Checkpoints take turns within a budget of memory: the sketches are the same, and loads are as few as can be."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from looped import LoopedTask
from loopsway.indexer import Checkpoint, ExampleSketcher, SketchConfig, TaskError
from loopsway.indexer.sketches.weights import WeightMemory

CONFIG = SketchConfig(width=256)
NUM_CHECKPOINTS = 4


class CountedTask(LoopedTask):
    """Notes each load of a checkpoint."""

    def __init__(self) -> None:
        super().__init__(count=6, num_checkpoints=NUM_CHECKPOINTS)
        self.loaded: list[str] = []

    def model(self, checkpoint: Checkpoint) -> nn.Module:
        self.loaded.append(checkpoint.name)
        return super().model(checkpoint)

    def second_moments(self, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
        draw = torch.Generator().manual_seed(len(checkpoint.name))
        return {
            name: torch.rand(parameter.shape, generator=draw)
            for name, parameter in super().model(checkpoint).named_parameters()
        }


def size_of_one() -> int:
    memory = WeightMemory()
    ExampleSketcher(CountedTask(), CONFIG, memory=memory)
    return memory.held_bytes // NUM_CHECKPOINTS


@pytest.mark.parametrize("config", [CONFIG, SketchConfig(width=256, optimizer_aware=True)])
def test_sketches_are_the_same_bit_for_bit_however_few_checkpoints_fit(config: SketchConfig) -> None:
    task = CountedTask()
    whole = ExampleSketcher(task, config, batch_size=2)
    whole_sketches = [whole.sketch(task.examples()) for _ in range(2)]
    size = WeightMemory()
    ExampleSketcher(task, config, memory=size)
    for fitting in range(1, NUM_CHECKPOINTS + 1):
        memory = WeightMemory(size.held_bytes // NUM_CHECKPOINTS * fitting)
        sketcher = ExampleSketcher(task, config, batch_size=2, memory=memory)
        for want in whole_sketches:
            got = sketcher.sketch(task.examples())
            assert torch.equal(got.values, want.values)
            assert torch.equal(got.losses, want.losses)
        assert memory.held_bytes <= size.held_bytes // NUM_CHECKPOINTS * fitting
        assert sketcher.fingerprint == whole.fingerprint


def test_a_batch_loads_only_the_checkpoints_that_do_not_fit() -> None:
    task = CountedTask()
    sketcher = ExampleSketcher(task, CONFIG, memory=WeightMemory(3 * size_of_one()))
    assert task.loaded == [checkpoint.name for checkpoint in task.checkpoints()]
    for _ in range(5):
        task.loaded.clear()
        sketcher.sketch(task.examples())
        assert len(task.loaded) == 1, "three stay, the fourth comes and goes"


def test_what_was_learned_of_a_model_outlasts_its_weights() -> None:
    """The first batch of two is checked against plain autograd, by a forward and backward more; no later one is."""
    task, calls = CountedTask(), list[int]()
    plain = task.losses
    task.losses = lambda model, batch: (calls.append(1), plain(model, batch))[1]
    sketcher = ExampleSketcher(task, CONFIG, memory=WeightMemory(size_of_one()))
    sketcher.sketch(task.examples())
    calls.clear()
    sketcher.sketch(task.examples())
    assert len(calls) == NUM_CHECKPOINTS


def test_what_was_not_used_for_longest_leaves_for_another_sketcher() -> None:
    memory = WeightMemory(NUM_CHECKPOINTS * size_of_one())
    first, second = (CountedTask() for _ in range(2))
    sketchers = [ExampleSketcher(task, CONFIG, memory=memory) for task in (first, second)]
    first.loaded.clear()
    second.loaded.clear()
    sketchers[1].sketch(second.examples())
    assert second.loaded == []
    sketchers[0].sketch(first.examples())
    assert len(first.loaded) == NUM_CHECKPOINTS
    sketchers[0].close()
    assert memory.held_bytes == 0


def test_a_model_larger_than_the_budget_is_held_alone(caplog: pytest.LogCaptureFixture) -> None:
    memory = WeightMemory(10)
    sketcher = ExampleSketcher(CountedTask(), CONFIG, memory=memory)
    assert "larger than the budget of 10 bytes: it is held alone" in caplog.text
    assert memory.held_bytes == size_of_one()
    assert sketcher.sketch(CountedTask().examples()).values.isfinite().all()
    with pytest.raises(ValueError, match="budget_bytes is 0, expected > 0"):
        WeightMemory(0)


def test_a_task_that_gives_its_first_model_again_is_told_to_load_anew() -> None:
    task, models = CountedTask(), {c.name: CountedTask().model(c) for c in CountedTask().checkpoints()}
    task.model = lambda checkpoint: models[checkpoint.name]
    sketcher = ExampleSketcher(task, CONFIG, memory=WeightMemory(size_of_one()))
    with pytest.raises(TaskError, match="it has to load anew"):
        sketcher.sketch(task.examples())


def test_a_call_that_nobody_waits_for_ends_before_the_next_checkpoint() -> None:
    task, parts = CountedTask(), list[int]()

    def go_on() -> None:
        parts.append(1)
        if len(parts) > 3:
            raise InterruptedError

    sketcher = ExampleSketcher(task, CONFIG, batch_size=2)
    with pytest.raises(InterruptedError):
        sketcher.sketch(task.examples(), go_on=go_on)
    assert len(parts) == 4, "three checkpoints of the first batch were run"
