"""Parity of a bit string, learned by a looped transformer: the smallest example of how to write a Task.

A Task names the checkpoints, loads the model, lists the training examples and computes each one's own loss. How the
model came to be is in `parity_training`, which this file only asks for what a finished run recorded.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import functional

from loopsway.indexer.config import Checkpoint, Loop
from loopsway.indexer.task import Task, TaskError

from .parity_model import ParityTransformer
from .parity_strings import MIN_LENGTH, encode, labels, parity, training_strings
from .parity_training import TrainReport


class ParityTask(Task):
    """An example is a string of bits; its label, even or odd, follows from them.

    The examples are the whole training set: every string of the training lengths that is not held out.

    Args:
        run: the folder that `loopsway train parity --run FOLDER` wrote.
    """

    loop = Loop(body=["block"])

    def __init__(self, run: str = "runs/parity") -> None:
        self.run = run

    def checkpoints(self) -> Sequence[Checkpoint]:
        return self._training.checkpoints

    def model(self, checkpoint: Checkpoint) -> torch.nn.Module:
        if checkpoint.path is None:
            raise TaskError(f"checkpoint {checkpoint.name!r} has no path; take it from ParityTask.checkpoints()")
        model = ParityTransformer(**self._training.model)
        model.load_state_dict(load_file(checkpoint.path))
        return model.eval()

    def examples(self) -> Sequence[str]:
        return self._examples

    def collate(self, examples: Sequence[str]) -> dict[str, torch.Tensor]:
        return {"tokens": encode(examples), "labels": labels(examples)}

    def losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional.cross_entropy(model(batch["tokens"]), batch["labels"], reduction="none")

    def example_from_json(self, obj: Any) -> str:
        """The string of `{"bits": "0101"}`."""
        if not isinstance(obj, dict) or set(obj) != {"bits"}:
            raise ValueError(
                f'a parity example is an object with the one key "bits", like {{"bits": "0101"}}; {_seen(obj)}'
            )
        bits, longest = obj["bits"], self._training.model["max_length"]
        if not isinstance(bits, str):
            raise ValueError(f'"bits" must be a string, like "0101"; {_seen(bits)}')
        if not MIN_LENGTH <= len(bits) <= longest:
            raise ValueError(f'"bits" has {len(bits)} characters; this model reads {MIN_LENGTH} to {longest}')
        if not set(bits) <= {"0", "1"}:
            raise ValueError(f'"bits" may hold only the characters 0 and 1; {_seen(bits)}')
        return bits

    def example_id(self, row: int) -> str:
        return self._examples[row]

    def metadata(self, row: int) -> dict[str, Any]:
        bits = self._examples[row]
        return {"length": len(bits), "ones": bits.count("1"), "parity": _name(bits)}

    def describe(self, row: int) -> str:
        return f"{self._examples[row]} -> {_name(self._examples[row])}"

    @cached_property
    def _training(self) -> TrainReport:
        try:
            return TrainReport.read(self.run)
        except (OSError, ValueError) as error:
            raise TaskError(f"{error}; run `loopsway train parity --run {self.run}`") from error

    @cached_property
    def _examples(self) -> list[str]:
        lengths = range(MIN_LENGTH, self._training.model["max_length"] + 1)
        return [bits for length in lengths for bits in training_strings(length)]


def _name(bits: str) -> str:
    return "odd" if parity(bits) else "even"


def _seen(obj: Any) -> str:
    """What came instead, shortened: it may be anything, of any size."""
    return f"got {type(obj).__name__} {reprlib.repr(obj)}"
