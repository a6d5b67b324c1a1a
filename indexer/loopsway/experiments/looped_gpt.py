"""Small looped GPTs over bytes; and as tasks, the models that time, memory and error are measured on.

B examples, T bytes, D model dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopsway.indexer import Checkpoint, Loop, Task

NUM_BYTES = 256
PADDING = 0
HEAD_DIMENSION = 32
PRELUDE, RECURRENT, CODA = 2, 4, 2


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Of a model and its batches.

    Attributes:
        dim: D.
        num_steps: times that the block is applied.
        num_bytes: T, of an example; longer ones are cut, shorter ones padded.
        batch: examples in one forward.
        bare: no biases, norms without parameters: the loop's body is four weight matrices.
        head_dim: of an attention head; divides D.
        mlp_factor: the MLP's width over D.
        starts_empty: the state begins at zero, not at the embedded bytes.
    """

    dim: int
    num_steps: int = 8
    num_bytes: int = 96
    batch: int = 16
    bare: bool = False
    head_dim: int = HEAD_DIMENSION
    mlp_factor: int = 4
    starts_empty: bool = False

    def __str__(self) -> str:
        return f"looped GPT d={self.dim}, T={self.num_bytes}, {self.num_steps} steps" + (", bare" if self.bare else "")


class Block(nn.Module):
    """Pre-norm causal attention and MLP."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        dim, inner, affine = shape.dim, shape.mlp_factor * shape.dim, not shape.bare
        self.head_dim = shape.head_dim
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=affine)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=affine)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=affine), nn.Linear(dim, dim, bias=affine)
        self.widen, self.narrow = nn.Linear(dim, inner, bias=affine), nn.Linear(inner, dim, bias=affine)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)  # [B, heads, T, D/heads]
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.narrow(F.gelu(self.widen(self.norm2(x))))


class LoopedGPT(nn.Module):
    """One block applied again and again, the embedded bytes injected at each step."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_steps, self.starts_empty = shape.num_steps, shape.starts_empty
        self.bytes, self.places = nn.Embedding(NUM_BYTES, shape.dim), nn.Embedding(shape.num_bytes, shape.dim)
        self.block, self.norm = Block(shape), nn.LayerNorm(shape.dim)
        self.head = nn.Linear(shape.dim, NUM_BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        injected = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        state = torch.zeros_like(injected) if self.starts_empty else injected
        for _ in range(self.num_steps):
            state = self.block(state + injected)
        return self.head(self.norm(state))


class PreludeCodaGPT(nn.Module):
    """The paper's shape: some blocks once, a stack of blocks again and again, some blocks once."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.num_steps = shape.num_steps
        self.bytes, self.places = nn.Embedding(NUM_BYTES, shape.dim), nn.Embedding(shape.num_bytes, shape.dim)
        self.prelude, self.recurrent, self.coda = (
            nn.Sequential(*(Block(shape) for _ in range(count))) for count in (PRELUDE, RECURRENT, CODA)
        )
        self.norm, self.head = nn.LayerNorm(shape.dim), nn.Linear(shape.dim, NUM_BYTES, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        state = injected = self.prelude(self.bytes(tokens) + self.places.weight[: tokens.shape[1]])
        for _ in range(self.num_steps):
            state = self.recurrent(state + injected)
        return self.head(self.norm(self.coda(state)))


def byte_rows(texts: Sequence[str], num_bytes: int) -> Tensor:
    """The bytes to read and the one after, [B, num_bytes + 1] int64."""
    rows = torch.full((len(texts), num_bytes + 1), PADDING)
    for row, text in zip(rows, texts, strict=True):
        data = torch.tensor(list(text.encode()[: len(row)]))
        row[: len(data)] = data
    return rows


def next_byte_losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Each text's mean loss over its bytes, [B]."""
    logits = model(rows[:, :-1]).transpose(1, 2)
    losses = F.cross_entropy(logits, rows[:, 1:], ignore_index=PADDING, reduction="none")  # [B, T]
    return losses.sum(1) / (rows[:, 1:] != PADDING).sum(1)


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
        return byte_rows(examples, self._shape.num_bytes)

    def losses(self, model: nn.Module, batch: Tensor) -> Tensor:
        return next_byte_losses(model, batch)

    def _train(self, steps: int) -> None:
        optimizer = torch.optim.AdamW(self._model.parameters(), lr=2e-3)
        for step in range(steps):
            start = step * self._shape.batch % max(1, len(self._texts) - self._shape.batch)
            batch = self.collate(self._texts[start : start + self._shape.batch])
            optimizer.zero_grad()
            self.losses(self._model, batch).mean().backward()
            optimizer.step()
        optimizer.zero_grad()


class PreludeCodaTask(GPTTask):
    architecture = PreludeCodaGPT
    body = "recurrent"
    loop = Loop(body=["recurrent"])
