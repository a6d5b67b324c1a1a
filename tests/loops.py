"""Loops of every shape: ranges of layers, two stacks at two rates, restarts, truncation, checkpointing, random counts.

B examples, T tokens, D features. Each model maps tokens [B, T] to class scores [B, 3], as those of looped.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from looped import PADDING, VOCABULARY, AttentionBlock
from loopsway.indexer import Loop

DIM = 8


class Stack(nn.Module):
    """Blocks one after another: H or L of a hierarchical model."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AttentionBlock(DIM) for _ in range(count))

    def forward(self, state: Tensor, message: Tensor, keep: Tensor) -> Tensor:
        state = state + message
        for block in self.blocks:
            state = block(state, keep)
        return F.rms_norm(state, (DIM,))


class Pooled(nn.Module):
    """Embeds, calls `iterate`, and classifies the mean over real tokens."""

    loop = Loop(body=["body"])

    def __init__(self, num_steps: int = 3) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.embed, self.head = nn.Embedding(VOCABULARY, DIM), nn.Linear(DIM, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        keep = tokens != PADDING
        return self.head((self.iterate(self.embed(tokens), keep) * keep[:, :, None]).sum(1))

    def iterate(self, x: Tensor, keep: Tensor) -> Tensor:
        raise NotImplementedError


class Hierarchical(Pooled):
    """Two stacks at two rates: L twice, then H once, in every cycle. L begins a step."""

    loop = Loop(body=["low", "high"])

    def __init__(self, num_steps: int = 2) -> None:
        super().__init__(num_steps)
        self.low, self.high = Stack(1), Stack(1)

    def iterate(self, x: Tensor, keep: Tensor) -> Tensor:
        low = high = x
        for _ in range(self.num_steps):
            for _ in range(2):
                low = self.low(low, high + x, keep)
            high = self.high(high, low, keep)
        return high


class SlowFirst(Hierarchical):
    """H before the two passes of L: H begins a step."""

    loop = Loop(body=["low", "high"], marker="high")

    def iterate(self, x: Tensor, keep: Tensor) -> Tensor:
        low = high = x
        for _ in range(self.num_steps):
            high = self.high(high, low, keep)
            for _ in range(2):
                low = self.low(low, high + x, keep)
        return low


class TruncatedCycles(Hierarchical):
    """All but the last cycle under no_grad, as hierarchical reasoning models train."""

    def iterate(self, x: Tensor, keep: Tensor) -> Tensor:
        low = high = x
        with torch.no_grad():
            low = self.low(low, high + x, keep)
            high = self.high(high, low, keep)
        low = self.low(low, high + x, keep)
        return self.high(high, low, keep)


class Layers(Pooled):
    """A range of layers with a prelude and a coda that are not in the loop."""

    loop = Loop(body=["layers.1", "layers.2"])

    def __init__(self, num_steps: int = 3) -> None:
        super().__init__(num_steps)
        self.layers = nn.ModuleList(AttentionBlock(DIM) for _ in range(4))

    def iterate(self, x: Tensor, keep: Tensor) -> Tensor:
        state = x = self.layers[0](x, keep)
        for _ in range(self.num_steps):
            state = self.one_pass(state + x, keep)
        return self.layers[3](state, keep)

    def one_pass(self, state: Tensor, keep: Tensor) -> Tensor:
        return self.layers[2](self.layers[1](state, keep), keep)


class Restarting(Layers):
    """Each pass restarts from the state before the loop, with a message from the pass before."""

    def __init__(self, num_steps: int = 3) -> None:
        super().__init__(num_steps)
        self.message = nn.Linear(DIM, DIM)

    def iterate(self, x: Tensor, keep: Tensor) -> Tensor:
        x = self.layers[0](x, keep)
        state = x
        for step in range(self.num_steps):
            state = self.one_pass(x + self.message(state) if step else x, keep)
        return self.layers[3](state, keep)


class EveryStepCounts(Layers):
    """The answer is the sum of every step's, and what all steps read is computed once."""

    def iterate(self, x: Tensor, keep: Tensor) -> Tensor:
        shared, state, total = self.layers[0](x, keep), x, torch.zeros_like(x)
        for _ in range(self.num_steps):
            state = self.one_pass(state + shared, keep)
            total = total + self.layers[3](state, keep)
        return total


class Detached(Layers):
    """The state is cut off from the passes before in the middle, the injection is not."""

    def iterate(self, x: Tensor, keep: Tensor) -> Tensor:
        state = x = self.layers[0](x, keep)
        for step in range(self.num_steps):
            state = self.one_pass(state + x, keep)
            state = state.detach() if step == 0 else state
        return self.layers[3](state, keep)


class Halting(Pooled):
    """Each example runs as many steps as it has tokens, up to the limit; those that are done leave the batch."""

    def __init__(self, num_steps: int = 4) -> None:
        super().__init__(num_steps)
        self.body = AttentionBlock(DIM)

    def iterate(self, x: Tensor, keep: Tensor) -> Tensor:
        state = x
        for step in range(self.num_steps):
            (active,) = torch.where(keep.sum(1) > step)
            state = state.index_copy(0, active, self.body(state[active] + x[active], keep[active]))
        return state


class UsedOutside(Pooled):
    """The body's own weights are used before the loop, in it, and after it; the embedding is the readout too."""

    loop = Loop(body=["body"], outside=True)

    def __init__(self, num_steps: int = 2) -> None:
        super().__init__(num_steps)
        self.body, self.scale = AttentionBlock(DIM), nn.Parameter(torch.ones(DIM))

    def iterate(self, x: Tensor, keep: Tensor) -> Tensor:
        state = x = F.linear(x, self.body.out.weight) * self.scale
        for _ in range(self.num_steps):
            state = self.body(state * self.scale, keep) + x
        return F.linear(self.body.norm1(state), self.embed.weight) @ self.embed.weight


class Checkpointed(Layers):
    """Activation checkpointing of each layer, of each step, or of all steps at once; `reentrant` None turns it off."""

    def __init__(self, num_steps: int = 3, *, reentrant: bool | None = None, span: str = "layer") -> None:
        super().__init__(num_steps)
        self.reentrant, self.span = reentrant, span

    def iterate(self, x: Tensor, keep: Tensor) -> Tensor:
        x = self.layers[0](x, keep)
        if self.span == "loop":
            return self.layers[3](self._checkpointed(self._all_passes, x, keep), keep)
        state = x
        for _ in range(self.num_steps):
            state = self._checkpointed(self.one_pass, state + x, keep)
        return self.layers[3](state, keep)

    def one_pass(self, state: Tensor, keep: Tensor) -> Tensor:
        if self.span != "layer":
            return super().one_pass(state, keep)
        for layer in self.layers[1:3]:
            state = self._checkpointed(layer, state, keep)
        return state

    def _all_passes(self, x: Tensor, keep: Tensor) -> Tensor:
        state = x
        for _ in range(self.num_steps):
            state = super().one_pass(state + x, keep)
        return state

    def _checkpointed(self, function: Any, *args: Tensor) -> Tensor:
        if self.reentrant is None or (self.span == "layer" and function == self.one_pass):
            return function(*args)
        return checkpoint(function, *args, use_reentrant=self.reentrant)


LOOPS = (
    Hierarchical,
    SlowFirst,
    TruncatedCycles,
    Layers,
    Restarting,
    EveryStepCounts,
    Detached,
    Halting,
    UsedOutside,
)
