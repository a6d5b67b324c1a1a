"""The five models that bench_sketch.py measures on, as tasks over the bytes of GSM8K or of made-up sums.

B examples, T bytes, D model dimension.

Each is written here in plain PyTorch, in the shape of the model that it stands for;
`loopsway.experiments.looped_gpt` has (a) to (c).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopsway.experiments.looped_gpt import (
    HEAD_DIMENSION,
    NUM_BYTES,
    PADDING,
    Block,
    GPTTask,
    PreludeCodaTask,
    Shape,
)
from loopsway.indexer import Loop

MASK, MASKED_EVERY = 1, 7  # a byte that no text has; and how far apart the bytes are that ALBERT must guess
EMBEDDED = 128  # ALBERT's embeddings are narrower than its layer
GPT2_LAYERS = 4
SMOKE_SHAPE = Shape(dim=32, num_steps=2, num_bytes=16, batch=4)


class AlbertLayer(nn.Module):
    """Post-norm attention over all positions, and MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.out, self.norm1 = nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.widen, self.narrow, self.norm2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (-1, HEAD_DIMENSION)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )  # [B, heads, T, D/heads]
        mixed = F.scaled_dot_product_attention(query, key, value)
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.narrow(F.gelu(self.widen(x), approximate="tanh")))


class Albert(nn.Module):
    """One shared layer applied again and again to narrow embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_steps = shape.num_steps
        self.bytes, self.places = nn.Embedding(NUM_BYTES, EMBEDDED), nn.Embedding(shape.num_bytes, EMBEDDED)
        self.norm, self.mapping = nn.LayerNorm(EMBEDDED), nn.Linear(EMBEDDED, shape.dim)
        self.layer, self.head = AlbertLayer(shape.dim), nn.Linear(shape.dim, NUM_BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.mapping(self.norm(self.bytes(tokens) + self.places.weight[: tokens.shape[1]]))
        for _ in range(self.num_steps):
            state = self.layer(state)
        return self.head(state)


class GPT2(nn.Module):
    """Layers that are applied once each: no loop; the readout is the embedding's table."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(NUM_BYTES, shape.dim), nn.Embedding(shape.num_bytes, shape.dim)
        nn.init.normal_(self.bytes.weight, std=0.02)  # as in GPT-2: it is the readout too
        self.blocks = nn.ModuleList(Block(shape) for _ in range(GPT2_LAYERS))
        self.norm = nn.LayerNorm(shape.dim)

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            state = block(state)
        return F.linear(self.norm(state), self.bytes.weight)


class GPT2Task(GPTTask):
    architecture = GPT2
    body = "blocks"
    loop = Loop(body=["blocks.*"], marker="blocks.0")


class AlbertTask(GPTTask):
    """Masked bytes are guessed from what stands on both sides."""

    architecture = Albert
    body = "layer"
    loop = Loop(body=["layer"])

    def losses(self, model: nn.Module, batch: Tensor) -> Tensor:
        tokens = batch[:, :-1]
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        masked[:, ::MASKED_EVERY] = True
        logits = model(tokens.masked_fill(masked, MASK)).transpose(1, 2)
        wanted = masked & (tokens != PADDING)
        losses = F.cross_entropy(logits, tokens, reduction="none") * wanted  # [B, T]
        return losses.sum(1) / wanted.sum(1)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A model and the size of its batches.

    Attributes:
        title: of its row in a table.
        kind: of its task.
        shape: of model and batch.
    """

    title: str
    kind: type[GPTTask]
    shape: Shape

    def __str__(self) -> str:
        steps = f"{self.shape.num_steps} step" + ("s" if self.shape.num_steps > 1 else "")
        return f"{self.title}, d={self.shape.dim}, T={self.shape.num_bytes}, {steps}, batch {self.shape.batch}"

    def task(self, texts: Sequence[str], *, training_steps: int = 0) -> GPTTask:
        return self.kind(self.shape, texts, training_steps=training_steps)

    def sized(
        self, *, batch: int | None = None, num_steps: int | None = None, num_bytes: int | None = None
    ) -> Workload:
        """The same model with another batch, number of steps or length."""
        sizes = {"batch": batch, "num_steps": num_steps, "num_bytes": num_bytes}
        return replace(
            self, shape=replace(self.shape, **{key: size for key, size in sizes.items() if size is not None})
        )

    def smoke(self) -> Workload:
        return replace(self, shape=replace(SMOKE_SHAPE, num_steps=min(self.shape.num_steps, SMOKE_SHAPE.num_steps)))


WORKLOADS = {
    "a": Workload(title="(a) looped GPT", kind=GPTTask, shape=Shape(dim=128)),
    "b": Workload(title="(b) looped GPT", kind=GPTTask, shape=Shape(dim=256, num_bytes=128)),
    "c": Workload(
        title="(c) 2 / 4 / 2 blocks",
        kind=PreludeCodaTask,
        shape=Shape(dim=256, num_bytes=128, num_steps=32, batch=4),
    ),
    "d": Workload(title="(d) ALBERT's shape", kind=AlbertTask, shape=Shape(dim=256, num_bytes=128, num_steps=12)),
    "e": Workload(title="(e) GPT-2 of 4 layers", kind=GPT2Task, shape=Shape(dim=256, num_bytes=128, num_steps=1)),
}


def workload(letter: str, *, smoke: bool) -> Workload:
    return WORKLOADS[letter].smoke() if smoke else WORKLOADS[letter]
