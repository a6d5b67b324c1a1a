"""Carries the gradient of a tensor that was made of parameters back to the parameters themselves.

B examples. `w.t()`, `w.float()`, `1 + w`, `w[e]`, weight norm's g v / |v|: what stands between a parameter and the
batch is the same for all examples, but its gradient is not. Transposes, casts, shifts, reshapes and choices of one
slice keep the gradient in its cheap form; anything else runs backwards once for each example.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .forms import Dense, Gradient, OuterProduct, in_full, multiplied_out
from .uses import Source

_SAME = frozenset(
    {"to", "float", "double", "half", "bfloat16", "type", "type_as", "contiguous", "clone", "requires_grad_"}
)
_SAME_ORDER = frozenset({"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as", "reshape_as"})
_SHIFTS = frozenset({"add", "__add__", "__radd__", "sub", "__sub__"})
_TRANSPOSES = frozenset({"t", "T", "mT", "transpose", "swapaxes", "swapdims", "adjoint"})


def to_parameters(source: Source, gradient: Gradient) -> Iterator[tuple[Tensor, Gradient]]:
    """The gradients, of the parameters in `source`, that its own gradient stands for."""
    if source.function is None:
        yield source.tensor, gradient
        return
    for parent, its_gradient in _one_back(source, gradient):
        yield from to_parameters(parent, its_gradient)


def _one_back(source: Source, gradient: Gradient) -> Iterator[tuple[Source, Gradient]]:
    parent = source.parents[0]
    before, after = parent.tensor.shape, source.tensor.shape
    alone, same = len(source.parents) == 1 and source.output < 0, before == after
    shifted = source.name in _SHIFTS and parent.tensor is source.args[0] and not source.kwargs
    if alone and same and (source.name in _SAME or shifted):
        yield parent, gradient
    elif alone and source.name in _SAME_ORDER:
        yield parent, gradient if before == after else Dense(multiplied_out(gradient, after))
    elif alone and source.name in _TRANSPOSES and _swaps_last_two(source):
        yield parent, _transposed(gradient, after)
    elif alone and source.name == "__getitem__" and isinstance(source.args[1], int):
        yield parent, _placed(gradient, source.args[1] % before[0], parent.tensor)
    else:
        yield from _by_autograd(source, gradient)


def _swaps_last_two(source: Source) -> bool:
    """Checked on strides, so that every way to write a transpose counts."""
    before, after = source.parents[0].tensor, source.tensor
    return (
        before.dim() in (2, 3)
        and after.shape == before.mT.shape
        and after.stride() == before.mT.stride()
        and after.data_ptr() == before.data_ptr()
    )


def _transposed(gradient: Gradient, shape: torch.Size) -> Gradient:
    match gradient:
        case OuterProduct(left, right, index):
            return OuterProduct(right, left, index)
        case _:
            values = multiplied_out(gradient, shape).unflatten(1, shape)
            return Dense(values.mT.flatten(1))


def _placed(gradient: Gradient, index: int, whole: Tensor) -> Gradient:
    """Of `whole[index]`, as a gradient of the whole."""
    match gradient:
        case OuterProduct(left, right, None) if whole.dim() == 3:
            return OuterProduct(left, right, index)
        case _:
            values = multiplied_out(gradient, whole[index].shape)
            return Dense(values, index * values.shape[1])


def _by_autograd(source: Source, gradient: Gradient) -> Iterator[tuple[Source, Gradient]]:
    cotangents = multiplied_out(gradient, source.tensor.shape).unflatten(1, source.tensor.shape or (1,))
    inputs = [in_full(parent.tensor.detach()).requires_grad_() for parent in source.parents]
    replaced = {id(parent.tensor): each for parent, each in zip(source.parents, inputs, strict=True)}
    with torch.enable_grad():
        out = source.function(*_replace(source.args, replaced), **_replace(source.kwargs, replaced))  # type: ignore[misc]
        out = out if source.output < 0 else out[source.output]
        out = out.reshape(source.tensor.shape or (1,))
        cotangents = cotangents.to(out.dtype)
        rows = _rows_by_autograd(out, inputs, cotangents)
    for parent, row in zip(source.parents, rows, strict=True):
        yield parent, Dense(row.reshape(len(row), -1))


def _rows_by_autograd(out: Tensor, inputs: list[Tensor], cotangents: Tensor) -> list[Tensor]:
    try:
        found = torch.autograd.grad(
            out, inputs, cotangents, is_grads_batched=True, allow_unused=True, retain_graph=True
        )
    except RuntimeError:  # a function that vmap does not know
        each = [torch.autograd.grad(out, inputs, one, allow_unused=True, retain_graph=True) for one in cotangents]
        found = [None if column[0] is None else torch.stack(column) for column in zip(*each, strict=True)]
    return [
        torch.zeros(len(cotangents), *one.shape) if rows is None else rows
        for one, rows in zip(inputs, found, strict=True)
    ]


def _replace(value: Any, replaced: dict[int, Tensor]) -> Any:
    match value:
        case Tensor():
            return replaced.get(id(value), value)
        case dict():
            return {key: _replace(each, replaced) for key, each in value.items()}
        case list() | tuple():
            return type(value)(_replace(each, replaced) for each in value)
        case _:
            return value
