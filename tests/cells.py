"""Loop bodies of one idea each: the ways in which a model can use a parameter of its own, in a line or a few.

B examples, T tokens, D = 8 features, H = 2 heads.

A cell maps the state [B, T, D] and the tokens [B, T] to an update [B, T, D]. `Looped` applies it again and again.
layers.py enters more cells, of whole layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looped import PADDING, VOCABULARY
from loopsway.indexer import Loop

DIM, HEADS = 8, 2

Use = Callable[[Any, Tensor, Tensor], Tensor]
CELLS: dict[str, tuple[Callable[[], dict[str, Any]], Use]] = {}


class Cell(nn.Module):
    """Parts under their names, and what is done with them."""

    def __init__(self, parts: dict[str, Any], use: Use) -> None:
        super().__init__()
        for name, part in parts.items():
            shape = part if isinstance(part, tuple) else None
            setattr(self, name, nn.Parameter(0.5 * torch.randn(shape)) if shape is not None else part)
        self._use = use

    def forward(self, state: Tensor, tokens: Tensor) -> Tensor:
        return self._use(self, state, tokens)


class Looped(nn.Module):
    """Embeds, applies the cell of this name again and again, and classifies the mean over real tokens."""

    loop = Loop(body=["cell"])

    def __init__(self, name: str, num_steps: int = 3) -> None:
        super().__init__()
        self.num_steps = num_steps
        parts, use = CELLS[name]
        self.embed, self.cell, self.head = nn.Embedding(VOCABULARY, DIM), Cell(parts(), use), nn.Linear(DIM, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        state = injected = self.embed(tokens)
        for _ in range(self.num_steps):
            state = torch.tanh(injected + 0.5 * state + self.cell(state, tokens))
        return self.head((state * (tokens != PADDING)[:, :, None]).sum(1))


def cell(name: str, **shapes: tuple[int, ...]) -> Callable[[Use], Use]:
    """Enters a use of bare parameters of these shapes."""
    return made(name, lambda: shapes)


def made(name: str, parts: Callable[[], dict[str, Any]]) -> Callable[[Use], Use]:
    """Enters a use of modules made anew for each model."""

    def enter(use: Use) -> Use:
        CELLS[name] = (parts, use)
        return use

    return enter


def module(name: str, make: Callable[[], nn.Module], use: Use = lambda c, x, t: c.inner(x)) -> None:
    """Enters one module of torch's or ours."""
    CELLS[name] = (lambda: {"inner": make()}, use)


# --- Linear maps -----------------------------------------------------------------------------------------------------

module("Linear", lambda: nn.Linear(DIM, DIM))
module("Linear, its bias frozen", lambda: _frozen_bias(nn.Linear(DIM, DIM)))
module("Bilinear", lambda: nn.Bilinear(DIM, DIM, DIM), lambda c, x, t: c.inner(x, x.flip(-1)))
cell("x @ w", w=(DIM, DIM))(lambda c, x, t: x @ c.w)
cell("x @ w.t()", w=(DIM, DIM))(lambda c, x, t: x @ c.w.t())
cell("addmm on flattened tokens", w=(DIM, DIM), b=(DIM,))(
    lambda c, x, t: torch.addmm(c.b, x.reshape(-1, DIM), c.w).view(x.shape)
)
cell("linear on tokens first", w=(DIM, DIM))(lambda c, x, t: F.linear(x.transpose(0, 1), c.w).transpose(0, 1))
cell("einsum", w=(DIM, DIM))(lambda c, x, t: torch.einsum("btd,de->bte", x, c.w))
cell("einsum over heads", w=(DIM, HEADS, 4), o=(HEADS, 4, DIM))(
    lambda c, x, t: torch.einsum("bthk,hkd->btd", torch.einsum("btd,dhk->bthk", x, c.w).tanh(), c.o)
)
cell("tensordot", w=(DIM, DIM))(lambda c, x, t: torch.tensordot(x, c.w, dims=1))
cell("bmm with an expanded weight", w=(DIM, DIM))(lambda c, x, t: torch.bmm(x, c.w[None].expand(len(x), -1, -1)))
cell("a weight on the left mixes tokens", w=(6, 6))(lambda c, x, t: c.w[: x.shape[1], : x.shape[1]] @ x)
cell("composed of two factors", a=(DIM, 2), b=(2, DIM))(lambda c, x, t: F.linear(x, c.a @ c.b))
cell("chunks of one weight", w=(3 * DIM, DIM))(
    lambda c, x, t: F.linear(x, c.w[:DIM]) * F.linear(x, c.w[DIM : 2 * DIM]).sigmoid() + x @ c.w.chunk(3)[2]
)
cell("concatenated weights", a=(3, DIM), b=(5, DIM))(lambda c, x, t: F.linear(x, torch.cat([c.a, c.b])))
cell("rows normalized by hand", w=(DIM, DIM))(lambda c, x, t: F.linear(x, c.w / c.w.norm(dim=1, keepdim=True)))
cell("keys and values that all examples share", keys=(5, DIM), values=(5, DIM))(
    lambda c, x, t: (x @ c.keys.t()).softmax(-1) @ c.values
)
cell("distances to a codebook", codes=(DIM, DIM))(lambda c, x, t: torch.cdist(x, c.codes[None]))

# --- Tables ----------------------------------------------------------------------------------------------------------

module("Embedding", lambda: nn.Embedding(VOCABULARY, DIM), lambda c, x, t: c.inner(t))
module("Embedding with padding", lambda: nn.Embedding(VOCABULARY, DIM, PADDING), lambda c, x, t: c.inner(t) * x)
module(
    "Embedding tied to a readout",
    lambda: nn.Embedding(VOCABULARY, DIM),
    lambda c, x, t: F.linear(x, c.inner.weight).softmax(-1) @ c.inner.weight + c.inner(t),
)
module(
    "EmbeddingBag", lambda: nn.EmbeddingBag(VOCABULARY, DIM, mode="sum"), lambda c, x, t: x * c.inner(t).unsqueeze(1)
)
cell("a table indexed by tokens", table=(VOCABULARY, DIM))(lambda c, x, t: c.table[t] * x)
cell("learned positions", table=(9, DIM))(lambda c, x, t: x * (x + c.table[: x.shape[1]]))
module(
    "embedded positions that all examples share",
    lambda: nn.Embedding(9, DIM),
    lambda c, x, t: (x + c.inner(torch.arange(x.shape[1]))).sin(),
)


@made("relative position bias", lambda: {"bias": nn.Embedding(11, HEADS), "qkv": nn.Linear(DIM, 3 * DIM)})
def _(c: Any, x: Tensor, t: Tensor) -> Tensor:
    place = torch.arange(x.shape[1])
    query, key, value = c.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    scores = query @ key.transpose(2, 3) + c.bias(place[:, None] - place + 5).permute(2, 0, 1)
    return (scores.masked_fill((t == PADDING)[:, None, None], -1e9).softmax(-1) @ value).transpose(1, 2).flatten(2)


# --- Norms -----------------------------------------------------------------------------------------------------------


class HandMadeRMSNorm(nn.Module):
    """Llama's, or with one added to the weight Gemma's."""

    def __init__(self, added: float) -> None:
        super().__init__()
        self.weight, self._added = nn.Parameter(torch.ones(DIM) - added), added

    def forward(self, x: Tensor) -> Tensor:
        normalized = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normalized * (self._added + self.weight) if self._added else self.weight * normalized


module("LayerNorm", lambda: nn.LayerNorm(DIM))
module("LayerNorm without a bias", lambda: nn.LayerNorm(DIM, bias=False))
module("LayerNorm over heads", lambda: nn.LayerNorm(4), lambda c, x, t: c.inner(x.unflatten(2, (2, 4))).flatten(2))
module("RMSNorm", lambda: nn.RMSNorm(DIM))
module("Llama's RMSNorm", lambda: HandMadeRMSNorm(0))
module("Gemma's RMSNorm", lambda: HandMadeRMSNorm(1.0))
module("GroupNorm", lambda: nn.GroupNorm(2, DIM), lambda c, x, t: c.inner(x.transpose(1, 2)).transpose(1, 2))
module(
    "InstanceNorm",
    lambda: nn.InstanceNorm1d(DIM, affine=True),
    lambda c, x, t: c.inner(x.transpose(1, 2)).transpose(1, 2),
)
module("BatchNorm", lambda: nn.BatchNorm1d(DIM), lambda c, x, t: c.inner(x.transpose(1, 2)).transpose(1, 2))

# --- Bare parameters -------------------------------------------------------------------------------------------------

cell("gain and shift", gain=(DIM,), shift=(DIM,))(lambda c, x, t: x * c.gain + c.shift)
cell("a bias alone", b=(DIM,))(lambda c, x, t: (x + c.b).sin())
cell("a bias added in place", b=(DIM,))(lambda c, x, t: x.sin().add_(c.b).cos())
cell("a bias added to a part in place", b=(3,))(lambda c, x, t: _add_to_part(x.sin(), c.b).cos())
cell("a scalar gate", alpha=())(lambda c, x, t: torch.sigmoid(c.alpha) * x.cos())
cell("a rate of interpolation", rate=(DIM,))(lambda c, x, t: torch.lerp(x, x.cos(), c.rate))
cell("a learned exponent", p=(DIM,))(lambda c, x, t: (1 + x.square()) ** c.p)
cell("addcmul", gain=(DIM,))(lambda c, x, t: torch.addcmul(x, x.cos(), c.gain))
cell("slopes where the state is negative", slope=(DIM,))(lambda c, x, t: torch.where(x > 0, x, x * c.slope))
cell("a log scale", s=(1, 1, DIM))(lambda c, x, t: x.cos() * c.s.exp())
cell("a mixture of functions", logits=(3,))(
    lambda c, x, t: (torch.stack([x, x.sin(), x.cos()], -1) * c.logits.softmax(0)).sum(-1)
)
cell("a token prepended", p=(1, DIM))(
    lambda c, x, t: torch.cat([c.p.expand(len(x), 1, DIM), x], 1).cumsum(1).sin()[:, 1:]
)
cell("a start for all tokens", p=(DIM,))(lambda c, x, t: c.p.expand_as(x) * x)
module("PReLU", lambda: nn.PReLU(DIM), lambda c, x, t: c.inner(x.transpose(1, 2)).transpose(1, 2))
made("ParameterList", lambda: {"gains": nn.ParameterList([torch.randn(DIM), torch.randn(DIM)])})(
    lambda c, x, t: torch.stack([x.sin() ** (k + 1) * gain for k, gain in enumerate(c.gains)]).sum(0)
)


@cell("a diagonal recurrence over tokens", decay=(DIM,), drive=(DIM,))
def _(c: Any, x: Tensor, t: Tensor) -> Tensor:
    hidden, rows = torch.zeros_like(x[:, 0]), []
    for token in x.unbind(1):
        hidden = hidden * c.decay.sigmoid() + token * c.drive
        rows.append(hidden)
    return torch.stack(rows, 1)


def _frozen_bias(linear: nn.Linear) -> nn.Linear:
    linear.bias.requires_grad_(False)
    return linear


def _add_to_part(x: Tensor, bias: Tensor) -> Tensor:
    x[..., : len(bias)] += bias
    return x
