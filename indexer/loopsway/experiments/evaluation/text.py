"""Next-byte prediction on the beginnings of school questions, by a tiny looped language model.

The questions are GSM8K's when the environment variable LOOPSWAY_GSM8K names a folder with gsm8k_train.jsonl and
gsm8k_test.jsonl; else sums in words, made up here.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from .subject import Course, Subject
from .text_model import NUM_BYTES, TextTransformer

DATA_VARIABLE = "LOOPSWAY_GSM8K"
PADDING = 0
NUM_ROWS, NUM_QUERIES = 200, 12
TINY = Course(num_steps=4, batch_size=16, learning_rate=3e-3, weight_decay=0.1, num_checkpoints=2)
SMALL = Course(num_steps=120, batch_size=32, learning_rate=3e-3, weight_decay=0.1, num_checkpoints=6)


class TextSubject(Subject):
    """Texts of up to 48 bytes; a wrong label is a text that is read backwards.

    Args:
        tiny: a model and a training for tests, which learn nothing.
    """

    body = ("block",)

    def __init__(self, *, tiny: bool = False) -> None:
        self.course = TINY if tiny else SMALL
        self._model = {"width": 16 if tiny else 32, "num_loops": 2 if tiny else 4, "max_length": 16 if tiny else 48}
        folder = os.environ.get(DATA_VARIABLE)
        self.name = "text (GSM8K)" if folder else f"text (sums in words: {DATA_VARIABLE} names no folder)"
        if folder:
            self.rows = _questions(Path(folder) / "gsm8k_train.jsonl", NUM_ROWS)
            self.queries = _questions(Path(folder) / "gsm8k_test.jsonl", NUM_QUERIES)
        else:
            texts = _sums(NUM_ROWS + NUM_QUERIES)
            self.rows, self.queries = texts[:NUM_ROWS], texts[NUM_ROWS:]

    def new_model(self) -> nn.Module:
        return TextTransformer(**self._model)

    def collate(self, examples: Sequence[str]) -> Tensor:
        """Bytes [B, max_length + 1]."""
        rows = torch.full((len(examples), self._model["max_length"] + 1), PADDING)
        for row, text in zip(rows, examples, strict=True):
            data = torch.tensor(list(text.encode()[: len(row)]))
            row[: len(data)] = data
        return rows

    def losses(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits, targets = model(batch[:, :-1]), batch[:, 1:]
        losses = functional.cross_entropy(
            logits.reshape(-1, NUM_BYTES), targets.flatten(), ignore_index=PADDING, reduction="none"
        )
        return losses.view_as(targets).sum(1) / (targets != PADDING).sum(1)

    def mislabelled(self, example: str) -> str:
        return example[: self._model["max_length"]][::-1]

    def facts(self) -> dict[str, object]:
        texts = hashlib.sha256("\0".join([*self.rows, *self.queries]).encode()).hexdigest()[:16]
        return {"subject": self.name, "course": asdict(self.course), "model": self._model, "texts": texts}


def _questions(file: Path, count: int) -> list[str]:
    """The first ones of a GSM8K file.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; set {DATA_VARIABLE} to the folder of {file.name}")
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line)["question"] for line, _ in zip(lines, range(count), strict=False)]


def _sums(count: int) -> list[str]:
    draw = random.Random(0)
    texts: list[str] = []
    for _ in range(count):
        name, thing = draw.choice(["Ada", "Emmy", "Sofia", "Mary"]), draw.choice(["apples", "books", "marbles"])
        first, second = draw.randrange(2, 99), draw.randrange(2, 99)
        texts.append(f"{name}: {first} {thing} and {second} {thing} are {first + second}.")
    return texts
