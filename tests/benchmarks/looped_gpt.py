"""A small looped GPT over bytes, as a task: the model that the benchmarks measure on.

B examples, T bytes, D model dimension.

The examples are GSM8K's when the environment variable LOOPSWAY_GSM8K names a folder with gsm8k_train.jsonl, else
sums in words, made up here.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopsway.indexer import Checkpoint, Loop, Task

DATA_VARIABLE = "LOOPSWAY_GSM8K"
NUM_BYTES = 256
PADDING = 0
HEAD_DIMENSION = 32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model and its batches.

    Attributes:
        dim: D.
        num_steps: times that the block is applied.
        num_bytes: T, of an example; longer ones are cut, shorter ones padded.
        batch: examples in one forward.
        bare: no biases, norms without parameters: the loop's body is four weight matrices.
    """

    dim: int
    num_steps: int = 8
    num_bytes: int = 96
    batch: int = 16
    bare: bool = False

    def __str__(self) -> str:
        return f"looped GPT d={self.dim}, T={self.num_bytes}, {self.num_steps} steps" + (", bare" if self.bare else "")


class Block(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        dim, affine = shape.dim, not shape.bare
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=affine)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=affine)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=affine), nn.Linear(dim, dim, bias=affine)
        self.widen, self.narrow = nn.Linear(dim, 4 * dim, bias=affine), nn.Linear(4 * dim, dim, bias=affine)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, HEAD_DIMENSION)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)  # [B, heads, T, D/heads]
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class LoopedGPT(nn.Module):
    """One block applied again and again, the embedded bytes injected at each step."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_steps = shape.num_steps
        self.bytes, self.places = nn.Embedding(NUM_BYTES, shape.dim), nn.Embedding(shape.num_bytes, shape.dim)
        self.block, self.norm = Block(shape), nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, NUM_BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        injected = state = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        for _ in range(self.num_steps):
            state = self.block(state + injected)
        return self.head(self.norm(state))


class GPTTask(Task):
    """Next-byte prediction by one model, trained for some steps of AdamW from a fixed seed.

    Attributes:
        architecture: of the model.
        body: name of the module that owns the loop's parameters.
    """

    architecture: type[nn.Module] = LoopedGPT
    body = "block"
    loop = Loop(body=["block"])

    def __init__(self, shape: Shape, texts: Sequence[str], *, training_steps: int = 0) -> None:
        self._shape, self._texts = shape, texts
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._model = self.architecture(shape)
        self._train(training_steps)

    def checkpoints(self) -> list[Checkpoint]:
        return [Checkpoint(name="last", learning_rate=1.0)]

    def model(self, checkpoint: Checkpoint) -> nn.Module:
        return self._model.eval()

    def examples(self) -> Sequence[str]:
        return self._texts

    def collate(self, examples: Sequence[str]) -> Tensor:
        """Bytes, [B, T + 1] int64."""
        rows = torch.full((len(examples), self._shape.num_bytes + 1), PADDING)
        for row, text in zip(rows, examples, strict=True):
            data = torch.tensor(list(text.encode()[: len(row)]))
            row[: len(data)] = data
        return rows

    def losses(self, model: nn.Module, batch: Tensor) -> Tensor:
        logits = model(batch[:, :-1]).transpose(1, 2)
        losses = F.cross_entropy(logits, batch[:, 1:], ignore_index=PADDING, reduction="none")  # [B, T]
        return losses.sum(1) / (batch[:, 1:] != PADDING).sum(1)

    def _train(self, steps: int) -> None:
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=2e-3)
        for step in range(steps):
            start = step * self._shape.batch % max(1, len(self._texts) - self._shape.batch)
            batch = self.collate(self._texts[start : start + self._shape.batch])
            optimizer.zero_grad()
            self.losses(self._model, batch).mean().backward()
            optimizer.step()
        optimizer.zero_grad()


class ServedGPT(GPTTask):
    """The same on made-up sums, as a server or a build names it.

    Args:
        dim: of the model.
        count: examples.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(Shape(dim=dim), synthetic_texts(count), training_steps=3)

    def example_from_json(self, obj: Any) -> str:
        if not isinstance(obj, dict) or not isinstance(obj.get("text"), str):
            raise ValueError(f"expected an object with a text, this is a {type(obj).__name__}")
        return obj["text"]

    def example_id(self, row: int) -> str:
        return f"sum-{row}"

    def describe(self, row: int) -> str:
        return self._texts[row]


def gsm8k_folder() -> Path | None:
    folder = os.environ.get(DATA_VARIABLE)
    return Path(folder) if folder else None


def gsm8k_texts(folder: Path, count: int, split: str = "train") -> list[str]:
    """Questions with their answers, of the split "train" or "test".

    Raises:
        FileNotFoundError: the folder has no such file.
    """
    file = folder / f"gsm8k_{split}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; set {DATA_VARIABLE} to the folder of {file.name}")
    with file.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    return [f"{record['question']}\n{record['answer']}" for record in records]


def synthetic_texts(count: int) -> list[str]:
    draw = random.Random(0)
    texts = []
    for _ in range(count):
        name, thing = draw.choice(["Ada", "Emmy", "Sofia", "Mary"]), draw.choice(["apples", "books", "marbles"])
        first, second = draw.randrange(2, 99), draw.randrange(2, 99)
        texts.append(
            f"{name} has {first} {thing} and finds {second} more. How many {thing} has {name} now?\n"
            f"{first} + {second} = {first + second} {thing}."
        )
    return texts
