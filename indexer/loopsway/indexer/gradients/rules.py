"""A use's per-example gradients, from its arguments and its output's gradient, in the cheapest exact form.

B examples, T tokens (whatever lies between batch and features, flattened), I inputs, O outputs, P entries.

A rule is a function of the use, its output's gradient and the owners of the output's entries; it yields (shared tensor
that was used, gradient). A use that no rule takes runs backwards under vmap (`backward.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .forms import Dense, Gradient, OuterProduct, TableRows, in_full
from .owners import Axis, Owners, Rows
from .uses import BROADCASTS, Source, Use

Found = Iterator[tuple[Source, Gradient]]


class Context:
    """What a rule reads: the use, its output's gradient and whose it is.

    Attributes:
        gradient: of the output, float32.
        values: the call's positional arguments.
    """

    def __init__(self, use: Use, gradient: Tensor, owners: Owners, batch: int) -> None:
        self.use, self.owners, self.batch = use, owners, batch
        self.gradient = in_full(gradient)
        assert use.leaves is not None
        self.values, self.keywords = use.arguments(use.leaves)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        return self.values[position] if position < len(self.values) else self.keywords.get(name, default)

    def source(self, value: Any) -> Source | None:
        return self.use.source_of(value) if isinstance(value, Tensor) else None

    def front(self, values: Tensor) -> Tensor:
        """[B, ...] of a tensor that has the output's shape, up to its features."""
        return self.owners.front(values, self.batch)

    def tokens(self, values: Tensor) -> Tensor:
        """[.., D] as float32 [B, T, D]."""
        front = self.front(values)
        return front.reshape(self.batch, -1, values.shape[-1]).float()

    def data(self, value: Tensor) -> Tensor:
        return self.use.data(value)

    def leads(self, features: int = 1) -> bool:
        """Whether owners are told by the dimensions before the last `features` ones."""
        owned = self.owners.axis + 1 if isinstance(self.owners, Axis) else self.owners.owner.dim()
        return owned <= self.gradient.dim() - features


def rule_for(context: Context) -> Found | None:
    """The gradients by a rule; None where no rule takes this use as it is."""
    rule = _RULES.get(context.use.name)
    return None if rule is None or context.gradient.is_complex() else rule(context)


def _linear(context: Context) -> Found | None:
    inputs, weight, bias = (context.argument(at, name) for at, name in enumerate(("input", "weight", "bias")))
    if context.source(inputs) is not None or weight.dim() != 2 or not context.leads():
        return None
    return _matrix(context, inputs, context.source(weight), bias, transposed=False)


def _addmm(context: Context) -> Found | None:
    bias, inputs, weight = context.values[:3]
    if context.keywords or context.source(inputs) is not None or not context.leads():
        return None
    return _matrix(context, inputs, context.source(weight), bias, transposed=True)


def _matmul(context: Context) -> Found | None:
    first, second = context.values[:2]
    left, right = context.source(first), context.source(second)
    if left is None and right is not None and second.dim() == 2 and first.dim() >= 2 and context.leads():
        return _matrix(context, first, right, None, transposed=True)
    if left is None and right is not None and second.dim() == first.dim() == 3 and context.leads():
        return _stack(context, first, right)
    if right is None and left is not None and first.dim() == 2 and second.dim() >= 3 and context.leads(2):
        return _matrix_on_the_left(context, left, second)
    return None


def _matrix(context: Context, inputs: Tensor, weight: Source | None, bias: Any, *, transposed: bool) -> Found:
    left = context.tokens(context.gradient)  # [B, T, O]
    if weight is not None:
        right = context.tokens(context.data(inputs))  # [B, T, I]
        yield weight, OuterProduct(right, left) if transposed else OuterProduct(left, right)
    if (source := context.source(bias)) is not None:
        yield source, Dense(_summed_to(left, source.tensor))


def _matrix_on_the_left(context: Context, weight: Source, inputs: Tensor) -> Found:
    left, right = (context.front(each).float().mT for each in (context.gradient, context.data(inputs)))
    yield weight, OuterProduct(left.flatten(1, -2), right.flatten(1, -2))


def _stack(context: Context, inputs: Tensor, weight: Source) -> Found | None:
    """[E, n, I] times [E, I, O]: one matrix for each expert."""
    if context.owners.select(0) is None or inputs.shape[0] != weight.tensor.shape[0]:
        return None
    return _experts(context, inputs, weight)


def _experts(context: Context, inputs: Tensor, weight: Source) -> Found:
    inputs = context.data(inputs)
    for index in range(len(inputs)):
        owners = context.owners.select(index)
        assert owners is not None
        left, right = (
            owners.front(each[index], context.batch).reshape(context.batch, -1, each.shape[-1]).float()
            for each in (context.gradient, inputs)
        )
        yield weight, OuterProduct(right, left, index)


def _grouped(context: Context) -> Found | None:
    """Rows in runs, one matrix for each run: [n, I] times [E, I, O], `offs` the ends of the runs."""
    inputs, weight = context.values[:2]
    ends, source = context.argument(2, "offs"), context.source(weight)
    bias = context.argument(3, "bias")
    if source is None or ends is None or bias is not None or weight.dim() != 3 or not context.leads():
        return None
    return _runs(context, inputs, source, ends)


def _runs(context: Context, inputs: Tensor, weight: Source, ends: Tensor) -> Found:
    start, inputs, owner = 0, context.data(inputs), context.owners
    if isinstance(owner, Axis):
        owner = Rows(owner.expected(inputs.shape[:1], context.batch, inputs.device))
    for index, end in enumerate(ends.tolist()):
        if end > start:
            owners = Rows(owner.owner[start:end])
            left, right = (owners.front(each[start:end], context.batch).float() for each in (context.gradient, inputs))
            yield weight, OuterProduct(right, left, index)
        start = end


def _embedding(context: Context) -> Found | None:
    rows, table = context.argument(0, "input"), context.argument(1, "weight")
    source = context.source(table)
    options = [context.argument(at, name) for at, name in ((3, "max_norm"), (5, "scale_grad_by_freq"))]
    if source is None or any(options) or not context.leads():
        return None
    return _looked_up(context, rows, source, context.argument(2, "padding_idx"))


def _looked_up(context: Context, rows: Tensor, table: Source, padding: int | None) -> Found:
    values = context.tokens(context.gradient)  # [B, T, D]
    flat = context.front(context.data(rows)).reshape(context.batch, -1)  # [B, T]
    if padding is not None:  # autograd gives the padding row no gradient
        values = values * (flat != padding % len(table.tensor)).unsqueeze(-1)
    yield table, TableRows(flat, values)


def _item(context: Context) -> Found | None:
    """`table[rows]`: a row of any shape for each index."""
    table, rows = context.values[:2]
    source = context.source(table)
    if source is None or not isinstance(rows, Tensor) or rows.is_floating_point() or rows.dtype == torch.bool:
        return None
    depth = rows.dim()
    if not context.leads(context.gradient.dim() - depth):
        return None
    return _gathered(context, rows, source)


def _gathered(context: Context, rows: Tensor, table: Source) -> Found:
    features = math.prod(table.tensor.shape[1:])
    values = context.front(context.gradient).reshape(context.batch, -1, features)
    flat = context.front(context.data(rows)).reshape(context.batch, -1) % len(table.tensor)
    yield table, TableRows(flat, values)


def _index_select(context: Context) -> Found | None:
    table, dimension, rows = context.values[:3]
    context.values = [table, rows]
    return _item(context) if dimension == 0 and rows.dim() == 1 else None


def _layer_norm(context: Context) -> Found | None:
    inputs, shape = context.argument(0, "input"), context.argument(1, "normalized_shape")
    weight, bias = context.argument(2, "weight"), context.argument(3, "bias")
    if context.source(inputs) is not None or not context.leads(len(shape)):
        return None
    eps = context.argument(4, "eps", 1e-5)
    return _normalized(context, inputs, weight, bias, lambda x: functional.layer_norm(x, shape, eps=eps))


def _rms_norm(context: Context) -> Found | None:
    inputs, shape = context.argument(0, "input"), context.argument(1, "normalized_shape")
    weight = context.argument(2, "weight")
    if context.source(inputs) is not None or not context.leads(len(shape)):
        return None
    eps = context.argument(3, "eps")
    eps = torch.finfo(inputs.dtype).eps if eps is None else eps
    return _normalized(context, inputs, weight, None, lambda x: functional.rms_norm(x, shape, eps=eps))


def _normalized(
    context: Context, inputs: Tensor, weight: Any, bias: Any, normalize: Callable[[Tensor], Tensor]
) -> Found:
    if (source := context.source(weight)) is not None:
        normalized = normalize(context.data(inputs).float())
        yield source, Dense(_summed_to(context.front(context.gradient * normalized), source.tensor))
    if (source := context.source(bias)) is not None:
        yield source, Dense(_summed_to(context.front(context.gradient), source.tensor))


def _add(context: Context) -> Found | None:
    return _elementwise(context, lambda _: context.gradient)


def _mul(context: Context) -> Found | None:
    return _elementwise(context, lambda other: context.gradient * other)


def _elementwise(context: Context, gradient_of: Callable[[Tensor], Tensor]) -> Found | None:
    if len(context.values) != 2 or context.keywords or len(context.use.sources) != 1:
        return None
    first, second = context.values
    source = context.source(first)
    other = second if source is not None else first
    source = source or context.source(second)
    if source is None or not isinstance(other, Tensor) or not _broadcasts(context, source.tensor):
        return None
    other = other if context.use.name.startswith(("add", "__add", "__iadd")) else context.data(other)
    return iter([(source, Dense(_summed_to(context.front(gradient_of(other)), source.tensor)))])


def _expand(context: Context) -> Found | None:
    [source] = context.use.sources.values()
    if not _broadcasts(context, source.tensor):
        return None
    return iter([(source, Dense(_summed_to(context.front(context.gradient), source.tensor)))])


def _broadcasts(context: Context, shared: Tensor) -> bool:
    """Whether `shared` has no extent where the owners lie, and the output's elsewhere or 1."""
    shape = context.gradient.shape
    aligned = (1,) * (len(shape) - shared.dim()) + tuple(shared.shape)
    if any(mine not in (1, whole) for mine, whole in zip(aligned, shape, strict=True)):
        return False
    if isinstance(context.owners, Axis):
        return aligned[context.owners.axis] == 1
    return all(size == 1 for size in aligned[: context.owners.owner.dim()])


def _summed_to(values: Tensor, shared: Tensor) -> Tensor:
    """[B, ..., *shape], summed over what `shared` was broadcast along: [B, P]."""
    values = values.float()
    extra = values.dim() - 1 - shared.dim()
    if extra > 0:
        values = values.flatten(1, extra).sum(1)
    broadcast = [at + 1 for at, size in enumerate(shared.shape) if size == 1 and values.shape[at + 1] != 1]
    if broadcast:
        values = values.sum(broadcast)
    return values.reshape(len(values), -1)


_RULES: dict[str, Callable[[Context], Found | None]] = {
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys(("matmul", "mm", "bmm", "__matmul__"), _matmul),
    **dict.fromkeys(("_grouped_mm", "grouped_mm"), _grouped),
    "embedding": _embedding,
    "__getitem__": _item,
    "index_select": _index_select,
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    **dict.fromkeys(("add", "add_", "__add__", "__radd__", "__iadd__"), _add),
    **dict.fromkeys(("mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"), _mul),
    **dict.fromkeys(BROADCASTS, _expand),
}
