"""Parity of short bit strings, stopped before it is learned by heart: what a model then answers depends on its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from loopsway.tasks.parity_model import ParityTransformer
from loopsway.tasks.parity_strings import MIN_LENGTH, encode, held_out_strings, parity, training_strings

from .subject import Course, Subject

__all__ = ["ParitySubject"]

MAX_LENGTH = 6
TINY = Course(num_steps=6, batch_size=16, learning_rate=3e-3, weight_decay=0.1, num_checkpoints=2)
SMALL = Course(num_steps=120, batch_size=64, learning_rate=3e-3, weight_decay=0.1, num_checkpoints=6)


class Labelled(NamedTuple):
    bits: str
    label: int


class ParitySubject(Subject):
    """Strings of up to six bits; the queries are the held-out ones.

    Args:
        tiny: a model and a training for tests, which learn nothing.
    """

    name = "parity"
    body = ("block",)

    def __init__(self, *, tiny: bool = False) -> None:
        self.course = TINY if tiny else SMALL
        self._model = {"width": 16 if tiny else 32, "num_heads": 2, "num_loops": 2 if tiny else 6}
        lengths = range(MIN_LENGTH, MAX_LENGTH + 1)
        self.rows, self.queries = (
            [Labelled(bits, parity(bits)) for length in lengths for bits in strings(length)]
            for strings in (training_strings, held_out_strings)
        )

    def new_model(self) -> nn.Module:
        return ParityTransformer(**self._model, max_length=MAX_LENGTH)

    def collate(self, examples: Sequence[Labelled]) -> tuple[Tensor, Tensor]:
        """Tokens [B, 1 + MAX_LENGTH] and labels [B]."""
        longest = "0" * MAX_LENGTH  # a string as long as any, so that all batches have one shape
        tokens = encode([*(example.bits for example in examples), longest])[:-1]
        return tokens, torch.tensor([example.label for example in examples])

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def mislabelled(self, example: Labelled) -> Labelled:
        return Labelled(example.bits, 1 - example.label)

    def facts(self) -> dict[str, object]:
        return {"subject": self.name, "course": asdict(self.course), "model": self._model, "max_length": MAX_LENGTH}
