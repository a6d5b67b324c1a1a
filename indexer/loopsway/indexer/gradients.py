"""The per-example gradient of one module call, from its input and its output's gradient, in the cheapest exact form.

B examples, T tokens (all dimensions between batch and features, flattened), I inputs, O outputs, P entries.

Nothing here knows of loops or sketches. A parameter's gradient comes as one of three forms: an outer product that
nobody has to multiply out, rows of a table, or the dense entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class OuterProduct:
    """Gradient sum_t left[t] right[t]^T, [B, O, I], not multiplied out."""

    left: Tensor  # [B, T, O] gradients at the output
    right: Tensor  # [B, T, I] inputs


@dataclass(frozen=True, eq=False)
class TableRows:
    """Gradient of a [V, D] table that is zero but at the rows that were looked up; a row may come more than once."""

    rows: Tensor  # [B, T] int64
    values: Tensor  # [B, T, D]


@dataclass(frozen=True, eq=False)
class Dense:
    """All entries of the gradient, in the parameter's own order."""

    values: Tensor  # [B, P]


Gradient = OuterProduct | TableRows | Dense
Rule = Callable[[nn.Module, Tensor, Tensor], dict[str, Gradient]]


def rule_of(module: nn.Module) -> Rule | None:
    """The function that gives this module's gradients, by parameter name; None if the module is not supported.

    A subclass counts as its parent only while it keeps the parent's forward.
    """
    for parent, rule in _RULES.items():
        if isinstance(module, parent) and type(module).forward is parent.forward:
            return rule
    return None


def supported() -> str:
    return ", ".join(parent.__name__ for parent in _RULES)


def _linear(module: nn.Module, inputs: Tensor, output_gradients: Tensor) -> dict[str, Gradient]:
    assert isinstance(module, nn.Linear)
    left = _tokens(output_gradients)  # [B, T, O]
    gradients: dict[str, Gradient] = {"weight": OuterProduct(left, _tokens(inputs))}
    if module.bias is not None:
        gradients["bias"] = Dense(left.sum(1))
    return gradients


def _embedding(module: nn.Module, inputs: Tensor, output_gradients: Tensor) -> dict[str, Gradient]:
    assert isinstance(module, nn.Embedding)
    rows = inputs.flatten(1) if inputs.dim() > 1 else inputs.unsqueeze(1)  # [B, T]
    values = _tokens(output_gradients)  # [B, T, D]
    if module.padding_idx is not None:  # autograd gives the padding row no gradient
        values = values * (rows != module.padding_idx).unsqueeze(-1)
    return {"weight": TableRows(rows, values)}


def _layer_norm(module: nn.Module, inputs: Tensor, output_gradients: Tensor) -> dict[str, Gradient]:
    assert isinstance(module, nn.LayerNorm)
    normalized = functional.layer_norm(inputs.float(), module.normalized_shape, eps=module.eps)
    return _scale_and_shift(module, normalized, output_gradients)


def _rms_norm(module: nn.Module, inputs: Tensor, output_gradients: Tensor) -> dict[str, Gradient]:
    assert isinstance(module, nn.RMSNorm)
    eps = torch.finfo(inputs.dtype).eps if module.eps is None else module.eps
    normalized = functional.rms_norm(inputs.float(), module.normalized_shape, eps=eps)
    return _scale_and_shift(module, normalized, output_gradients)


def _scale_and_shift(module: nn.Module, normalized: Tensor, output_gradients: Tensor) -> dict[str, Gradient]:
    assert isinstance(module, nn.LayerNorm | nn.RMSNorm)
    batch, features = normalized.shape[0], module.weight.numel()
    shift = output_gradients.reshape(batch, -1, features).float()  # [B, T, P]
    gradients: dict[str, Gradient] = {"weight": Dense((shift * normalized.reshape(batch, -1, features)).sum(1))}
    if getattr(module, "bias", None) is not None:
        gradients["bias"] = Dense(shift.sum(1))
    return gradients


def _tokens(values: Tensor) -> Tensor:
    """[B, ..., D] as float32 [B, T, D]; T = 1 where there is nothing between."""
    return values.reshape(values.shape[0], -1, values.shape[-1]).float()


_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.Embedding: _embedding,
}
