"""More cells: attention, convolutions, recurrences, experts, and parameters that are shared, parametrized or hidden.

B examples, T tokens, D = 8 features, H = 2 heads, E = 3 experts, N = B * T.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from cells import CELLS, DIM, HEADS, Looped, cell, made, module
from looped import PADDING

__all__ = ["CELLS", "SINGLE_ONLY", "Looped"]

EXPERTS = 3
SINGLE_ONLY = {"experts by a grouped product"}  # run in float32 alone

# --- Attention, convolutions, recurrences ----------------------------------------------------------------------------


def _attend(c: Any, x: Tensor, t: Tensor) -> Tensor:
    mask = t == PADDING
    if c.inner.batch_first:
        return c.inner(x, x, x, key_padding_mask=mask, need_weights=False)[0]
    x = x.transpose(0, 1)
    return c.inner(x, x, x, key_padding_mask=mask)[0].transpose(0, 1)


module("MultiheadAttention", lambda: nn.MultiheadAttention(DIM, HEADS, batch_first=True), _attend)
module("MultiheadAttention, tokens first", lambda: nn.MultiheadAttention(DIM, HEADS), _attend)
module(
    "MultiheadAttention with learned keys",
    lambda: nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True, batch_first=True),
    lambda c, x, t: c.inner(x, x.sin(), x)[0],
)
for norm_first in (False, True):
    module(
        f"TransformerEncoderLayer, norm_first={norm_first}",
        lambda first=norm_first: nn.TransformerEncoderLayer(DIM, HEADS, 16, 0.0, norm_first=first, batch_first=True),
        lambda c, x, t: c.inner(x, src_key_padding_mask=t == PADDING),
    )
module(
    "TransformerDecoderLayer, tokens first",
    lambda: nn.TransformerDecoderLayer(DIM, HEADS, 16, 0.0),
    lambda c, x, t: c.inner(x.transpose(0, 1), x.transpose(0, 1).sin()).transpose(0, 1),
)


def _causal(c: Any, x: Tensor, t: Tensor) -> Tensor:
    return c.inner(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2)


module("Conv1d", lambda: nn.Conv1d(DIM, DIM, 3), _causal)
module("Conv1d, depthwise", lambda: nn.Conv1d(DIM, DIM, 3, groups=DIM, bias=False), _causal)
module("Conv1d, two groups", lambda: nn.Conv1d(DIM, DIM, 3, groups=2), _causal)
module("Conv2d", lambda: nn.Conv2d(1, 1, 3, padding=1), lambda c, x, t: c.inner(x.unsqueeze(1)).squeeze(1))
module(
    "ConvTranspose1d",
    lambda: nn.ConvTranspose1d(DIM, DIM, 3, padding=1),
    lambda c, x, t: c.inner(x.transpose(1, 2)).transpose(1, 2),
)
module("GRU", lambda: nn.GRU(DIM, DIM, batch_first=True), lambda c, x, t: c.inner(x)[0])
module("LSTM, tokens first", lambda: nn.LSTM(DIM, DIM), lambda c, x, t: c.inner(x.transpose(0, 1))[0].transpose(0, 1))
module(
    "GRUCell",
    lambda: nn.GRUCell(DIM, DIM),
    lambda c, x, t: c.inner(x.flatten(0, 1), x.cos().flatten(0, 1)).view(x.shape),
)

# --- Experts ---------------------------------------------------------------------------------------------------------


def _route(c: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flattened tokens [N, D], each one's expert [N] and that expert's weight [N, 1]."""
    rows = x.reshape(-1, DIM)
    weights, chosen = c.router(rows).softmax(-1).max(-1, keepdim=True)
    return rows, chosen.squeeze(-1), weights


def _experts() -> dict[str, Any]:
    return {"router": nn.Linear(DIM, EXPERTS), "w": (EXPERTS, DIM, DIM)}


@made("experts in a loop", _experts)
def _(c: Any, x: Tensor, t: Tensor) -> Tensor:
    rows, chosen, weights = _route(c, x)
    out = torch.zeros_like(rows)
    for expert in range(EXPERTS):
        (index,) = torch.where(chosen == expert)
        out.index_add_(0, index, rows[index] @ c.w[expert] * weights[index])
    return out.view(x.shape)


@made("experts gathered for each token", _experts)
def _(c: Any, x: Tensor, t: Tensor) -> Tensor:
    rows, chosen, weights = _route(c, x)
    return (torch.bmm(rows.unsqueeze(1), c.w[chosen]).squeeze(1) * weights).view(x.shape)


@made("all experts for every token", _experts)
def _(c: Any, x: Tensor, t: Tensor) -> Tensor:
    rows, chosen, weights = _route(c, x)
    every = torch.bmm(rows.expand(EXPERTS, -1, -1), c.w)  # [E, N, D]
    return (every[chosen, torch.arange(len(rows))] * weights).view(x.shape)


@made("experts by a grouped product", _experts)
def _(c: Any, x: Tensor, t: Tensor) -> Tensor:
    rows, chosen, weights = _route(c, x)
    order = chosen.argsort(stable=True)
    ends = F.one_hot(chosen, EXPERTS).sum(0).cumsum(0).int()
    out = torch.empty_like(rows)
    out[order] = F.grouped_mm(rows[order], c.w, offs=ends) * 1.0
    return (out * weights).view(x.shape)


@cell("real tokens packed without padding", w=(DIM, DIM))
def _(c: Any, x: Tensor, t: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    out[t != PADDING] = F.linear(x[t != PADDING], c.w)
    return out


# --- Shared, parametrized and custom ---------------------------------------------------------------------------------


def _twins() -> dict[str, Any]:
    first, second = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)
    second.weight = first.weight
    return {"first": first, "second": second}


made("a weight under two names", _twins)(lambda c, x, t: c.second(c.first(x).tanh()))
made("a module under two names", lambda: dict.fromkeys(["first", "second"], nn.Linear(DIM, DIM)))(
    lambda c, x, t: c.second(c.first(x).tanh())
)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).transpose(0, 1)


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings(), torch.no_grad():  # deprecated, and a weight with a graph can't be copied
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(nn.Linear(DIM, DIM))


module("weight_norm", lambda: parametrizations.weight_norm(nn.Linear(DIM, DIM)))
module("weight_norm by hooks", _old_weight_norm)
module("weight_norm of a Conv1d", lambda: parametrizations.weight_norm(nn.Conv1d(DIM, DIM, 3)), _causal)
module("spectral_norm", lambda: parametrizations.spectral_norm(nn.Linear(DIM, DIM)))
module(
    "a custom parametrization",
    lambda: parametrize.register_parametrization(nn.Linear(DIM, DIM), "weight", Symmetric()),
)


class Scale(torch.autograd.Function):
    """x * gain, opaque to any rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return x * gain

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, gain = ctx.saved_tensors
        return gradients[0] * gain, (gradients[0] * x).flatten(0, -2).sum(0)


cell("a custom autograd.Function", gain=(DIM,))(lambda c, x, t: Scale.apply(x.cos(), c.gain))
cell("a filter in the frequency domain", spectrum=(5, DIM, 2))(
    lambda c, x, t: torch.fft.irfft(torch.fft.rfft(x, n=8, dim=1) * torch.view_as_complex(c.spectrum), dim=1)[
        :, : x.shape[1]
    ]
)
module(
    "functional_call with a scaled weight",
    lambda: nn.Linear(DIM, DIM),
    lambda c, x, t: torch.func.functional_call(c.inner, {"weight": 2 * c.inner.weight}, (x,)),
)
cell("vmap over examples", w=(DIM, DIM))(lambda c, x, t: torch.vmap(lambda row: row @ c.w)(x))
module(
    "a module called on what all examples share",
    lambda: nn.Linear(DIM, DIM),
    lambda c, x, t: c.inner(x) * c.inner(torch.linspace(-1, 1, DIM)) + c.inner(torch.eye(DIM)[None, :3]).mean(),
)
module("a module called twice in a step", lambda: nn.Linear(DIM, DIM), lambda c, x, t: c.inner(c.inner(x).tanh()))
