"""Small looped models, a task made of them, and the oracle: untied copies of the loop body.

B examples, S steps, P entries of all body parameters.

The oracle is dumb on purpose: the body is copied once for each step, one example at a time runs in float64, and each
copy's `.grad` is that step's gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loopsway.indexer import Checkpoint, Loop, Task

VOCABULARY = 7
PADDING = 0


class AttentionBlock(nn.Module):
    """Pre-norm attention and MLP, with biases and LayerNorm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        query, key, value = (part.unsqueeze(1) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(query, key, value, attn_mask=keep[:, None, None]).squeeze(1))
        return x + self.mlp(self.norm2(x))


class InjectedModel(nn.Module):
    """One block applied again and again, the input injected at each pass."""

    loop = Loop(body=["block"])

    def __init__(self, dim: int = 12, num_steps: int = 4) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.embed, self.block, self.head = nn.Embedding(VOCABULARY, dim), AttentionBlock(dim), nn.Linear(dim, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        keep = tokens != PADDING
        state = injected = self.embed(tokens)
        for _ in range(self.num_steps):
            state = self.block(state + injected, keep)
        return self.head((state * keep[:, :, None]).sum(1))


class RangeModel(nn.Module):
    """A range of layers with RMSNorm and no biases; the first passes run under no_grad (truncated backpropagation)."""

    loop = Loop(body=["layers.*"], marker="layers.0")

    def __init__(self, dim: int = 10, num_steps: int = 3, truncated: int = 1) -> None:
        super().__init__()
        self.num_steps, self.truncated = num_steps, truncated
        self.embed, self.head = nn.Embedding(VOCABULARY, dim), nn.Linear(dim, 3)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(dim), nn.Linear(dim, 2 * dim, bias=False), nn.SiLU(), nn.Linear(2 * dim, dim))
            for _ in range(2)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        keep = (tokens != PADDING)[:, :, None]
        state = self.embed(tokens)
        for step in range(self.num_steps):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= self.truncated):
                for layer in self.layers:
                    state = state + layer(state)
        return self.head((state * keep).sum(1))


class CellModel(nn.Module):
    """A recurrent cell on [B, D], without tokens: an embedding inside the body, one norm called twice in a step."""

    loop = Loop(body=["cell*"])

    class Cell(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(VOCABULARY, dim, padding_idx=PADDING), nn.LayerNorm(dim)
            self.update, self.gate = nn.Linear(dim, dim), nn.Linear(2 * dim, dim, bias=False)

        def forward(self, state: Tensor, tokens: Tensor) -> Tensor:
            looked_up = (self.embed(tokens) * (tokens != PADDING)[:, :, None]).sum(1)
            gate = torch.sigmoid(self.gate(torch.cat([self.norm(state), looked_up], dim=-1)))
            return state + gate * torch.tanh(self.update(self.norm(state + looked_up)))

    def __init__(self, dim: int = 8, num_steps: int = 5) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.start, self.cell, self.head = nn.Parameter(torch.randn(dim)), self.Cell(dim), nn.Linear(dim, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.start.expand(len(tokens), -1)
        for _ in range(self.num_steps):
            state = self.cell(state, tokens)
        return self.head(state)


MODELS = (InjectedModel, RangeModel, CellModel)


@dataclass(frozen=True)
class Labelled:
    """An example: tokens without padding, and the class of the whole."""

    tokens: tuple[int, ...]

    @property
    def label(self) -> int:
        return sum(self.tokens) % 3


def make_model(kind: Callable[..., nn.Module], seed: int = 0, **arguments: Any) -> Any:
    """A model in eval mode whose norms are not at their initial ones and zeros."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(**arguments).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def make_examples(count: int, seed: int = 0, *, longest: int = 6) -> list[Labelled]:
    """Token strings of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, longest + 1, (count,), generator=generator).tolist()
    return [
        Labelled(tuple(torch.randint(1, VOCABULARY, (length,), generator=generator).tolist())) for length in lengths
    ]


def collate(examples: Sequence[Labelled]) -> dict[str, Tensor]:
    longest = max(len(example.tokens) for example in examples)
    padded = [example.tokens + (PADDING,) * (longest - len(example.tokens)) for example in examples]
    return {"tokens": torch.tensor(padded), "labels": torch.tensor([example.label for example in examples])}


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["tokens"]), batch["labels"], reduction="none")


class LoopedTask(Task):
    """A task of one of these models, with random weights at two checkpoints."""

    def __init__(self, kind: str = "InjectedModel", count: int = 40, num_checkpoints: int = 2) -> None:
        self._kind = {each.__name__: each for each in MODELS}[kind]
        self.loop = self._kind.loop
        self._examples, self._num_checkpoints = make_examples(count), num_checkpoints

    def checkpoints(self) -> list[Checkpoint]:
        return [Checkpoint(name=f"step-{k}", learning_rate=0.1 / (k + 1)) for k in range(self._num_checkpoints)]

    def model(self, checkpoint: Checkpoint) -> nn.Module:
        return make_model(self._kind, seed=int(checkpoint.name.removeprefix("step-")))

    def examples(self) -> list[Labelled]:
        return self._examples

    def collate(self, examples: Sequence[Labelled]) -> dict[str, Tensor]:
        return collate(examples)

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return losses(model, batch)

    def example_id(self, row: int) -> str:
        return f"train/{row}"

    def describe(self, row: int) -> str:
        return " ".join(map(str, self._examples[row].tokens))

    def metadata(self, row: int) -> dict[str, Any]:
        return {"length": len(self._examples[row].tokens), "label": self._examples[row].label}

    def example_from_json(self, obj: Any) -> Labelled:
        if not (isinstance(obj, dict) and isinstance(obj.get("tokens"), list)):
            raise ValueError('expected {"tokens": [..]}')
        tokens = tuple(obj["tokens"])
        if not tokens or not all(isinstance(token, int) and 0 < token < VOCABULARY for token in tokens):
            raise ValueError(f"tokens are {tokens}, expected numbers from 1 to {VOCABULARY - 1}")
        return Labelled(tokens)


def step_gradients(model: nn.Module, loop: Loop, examples: Sequence[Labelled]) -> Tensor:
    """Each example's gradient with respect to each step's own copy of the body, float64 [B, S, P].

    Parameters come in the order of `StepSketcher.parameters`, which is that of `model.named_modules()`.
    """
    untied = copy.deepcopy(model).double()
    names = [
        name for name, _ in untied.named_children() if name in {part.split(".")[0].rstrip("*") for part in loop.body}
    ]
    copies = {name: _untie(untied, name) for name in names}
    rows = []
    for example in examples:
        untied.zero_grad()
        for body in copies.values():
            body.begin()
        losses(untied, collate([example])).sum().backward()
        rows.append(torch.cat([body.gradients() for body in copies.values()], dim=1))
    return torch.stack(rows)


class _Untied(nn.Module):
    """Stands for a body module: its s-th call goes to the s-th copy."""

    def __init__(self, body: nn.Module, num_steps: int) -> None:
        super().__init__()
        self.copies = nn.ModuleList(copy.deepcopy(body) for _ in range(num_steps))
        self.begin()

    def begin(self) -> None:
        self._calls = 0

    def forward(self, *args: Any) -> Any:
        self._calls += 1
        return self.copies[self._calls - 1](*args)

    def gradients(self) -> Tensor:
        """[S, P], zero where a copy got none."""
        return torch.stack(
            [
                torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in _ordered(body)])
                for body in self.copies
            ]
        )


class _UntiedLayers(nn.Module):
    """The same for a list of layers that are called one after another."""

    def __init__(self, layers: nn.ModuleList, num_steps: int) -> None:
        super().__init__()
        self.untied = [_Untied(layer, num_steps) for layer in layers]
        self.layers = nn.ModuleList(self.untied)

    def __iter__(self) -> Any:
        return iter(self.untied)

    def begin(self) -> None:
        for layer in self.untied:
            layer.begin()

    def gradients(self) -> Tensor:
        return torch.cat([layer.gradients() for layer in self.untied], dim=1)


def _untie(model: Any, name: str) -> Any:
    body = getattr(model, name)
    wrapper = _UntiedLayers if isinstance(body, nn.ModuleList) else _Untied
    untied = wrapper(body, model.num_steps)
    setattr(model, name, untied)
    return untied


def _ordered(body: nn.Module) -> list[nn.Parameter]:
    return [parameter for module in body.modules() for parameter in module.parameters(recurse=False)]
