"""Sees every use of a parameter in a forward pass, whoever owns the parameter and whatever function uses it.

A `TorchFunctionMode` passes every torch call on and looks at its arguments. Tensors are of two kinds: *shared* ones
come from parameters, buffers and constants alone and are the same for all examples; all others depend on the batch.
A call on shared tensors gives a shared one, remembered with how it was made if a parameter is in it (`w.t()`, `1 + w`,
weight norm's product). A call that brings a shared tensor with a parameter in it together with the batch is a *use*:
its output's gradient decides the parameter's gradient, example by example.

This file knows no gradients and no loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

# Calls on parameters alone whose result is nevertheless one for each example: broadcasting to the batch's size.
BROADCASTS = frozenset({"expand", "expand_as", "broadcast_to", "repeat"})
_CUTS = frozenset({"detach", "data", "grad", "detach_"})
# Calls that bring rows into an order that depends on the batch, and those that put rows where an order is fixed.
_MOVES = frozenset(
    {"__getitem__", "index_select", "masked_select", "gather", "take_along_dim", "take", "repeat_interleave"}
)
_PLACES = frozenset({"__setitem__", "index_add", "index_put", "index_copy", "scatter", "scatter_add", "masked_scatter"})
_MOVED = "_loopsway_moved"


class NotFollowedError(ValueError):
    """A use of a parameter whose gradient can't be told example by example from the outside."""


@dataclass(frozen=True, eq=False)
class Source:
    """How a shared tensor with a parameter in it was made; `function` is None for a parameter itself."""

    tensor: Tensor
    function: Callable[..., Any] | None = None
    name: str = ""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: int = 0
    parents: tuple[Source, ...] = ()

    def roots(self) -> Iterator[Tensor]:
        """The parameters in it."""
        if self.function is None:
            yield self.tensor
        for parent in self.parents:
            yield from parent.roots()


class _Flat(NamedTuple):
    """Arguments none of which is a list or tuple of tensors: how many are positional, and the others' names."""

    num_positional: int
    names: tuple[str, ...]


@dataclass(eq=False)
class Use:
    """One call that brought parameters and the batch together.

    Attributes:
        name: the function's, `linear` or `mul` say.
        leaves: its arguments, flattened; tensors detached. None once its gradients are done.
        sources: of those leaves that have a parameter in them, by position.
        shape: of the (first differentiable) output.
        autocast: the dtype that autocast had, None when it was off.
        is_moved: whether the batch's rows may be in another order than they came in.
        versions: of the leaves' data when the call was made.
    """

    function: Callable[..., Any]
    name: str
    leaves: list[Any] | None
    structure: Any
    sources: dict[int, Source]
    shape: tuple[int, ...] = ()
    autocast: torch.dtype | None = None
    versions: tuple[int, ...] = ()
    is_moved: bool = False

    def arguments(self, leaves: list[Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments, with these leaves in place of the call's."""
        if isinstance(self.structure, _Flat):
            num_positional, names = self.structure
            return leaves[:num_positional], dict(zip(names, leaves[num_positional:], strict=True))
        args, kwargs = tree_unflatten(leaves, self.structure)
        return list(args), kwargs

    def data(self, value: Tensor) -> Tensor:
        """A data argument, which must still be what it was.

        Raises:
            ValueError: it was changed in place since.
        """
        assert self.leaves is not None
        place = next((at for at, leaf in enumerate(self.leaves) if leaf is value), None)
        if place is not None and value._version != self.versions[place]:
            raise ValueError(
                f"an input of {self.name}() was changed in place after the call; the parameter's gradient is lost: "
                "write the change without the underscore"
            )
        return value

    def source_of(self, value: Any) -> Source | None:
        return next((source for source in self.sources.values() if source.tensor is value), None)

    def site(self) -> tuple[Any, ...]:
        """Equal for uses that can be expected to treat examples alike."""
        roots = tuple(id(root) for source in self.sources.values() for root in source.roots())
        return self.name, roots, tuple(self.sources), len(self.shape)


OnUse = Callable[[Use, Any], Any]


class Uses(TorchFunctionMode):
    """Reports each use of the given parameters.

    Args:
        parameters: whose uses are wanted.
        constants: other tensors that are the same for all examples: frozen parameters and buffers.
        on_use: called with each use and the call's output; gives the output to go on with.
        is_broadcast: whether an expansion of a parameter gives each example its own part; asked with the use.
        anchors: let what frozen parameters give need a gradient: reentrant checkpointing drops the gradients of a part
            none of whose inputs needs one.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        constants: Iterable[Tensor],
        on_use: OnUse,
        is_broadcast: Callable[[Use], bool],
        *,
        anchors: bool = False,
    ) -> None:
        super().__init__()
        self._anchors, self._any_moved = anchors, False
        self._on_use, self._is_broadcast = on_use, is_broadcast
        self._shared: dict[int, tuple[Tensor, Source | None]] = {id(tensor): (tensor, None) for tensor in constants}
        self._shared |= {id(parameter): (parameter, Source(parameter)) for parameter in parameters}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            _refuse_dropout(func, args, kwargs)
        if func in _BACKWARDS:
            return self._backward(*args, **kwargs)
        all_shared, any_shared, any_source = True, False, False
        for tensor in _tensors(args, kwargs):
            entry = self._shared.get(id(tensor))
            if entry is None:
                all_shared = False
            else:
                any_shared = True
                any_source |= entry[1] is not None
        if all_shared:
            return self._derive(func, args, kwargs, any_source)
        if any_source:
            return self._use(func, args, kwargs)
        if _changes_its_argument(func):
            self._shared.pop(id(args[0]), None)
        moved = self._is_moved(func, args, kwargs)
        self._any_moved |= moved
        out = func(*args, **kwargs)
        if any_shared and self._anchors and isinstance(out, Tensor):
            out = _with_anchor(out, func)
        return _marked(out) if moved else out

    def _is_moved(self, func: Any, args: Any, kwargs: Any) -> bool:
        name = getattr(func, "__name__", "")
        if not self._any_moved and name not in _MOVES:
            return False
        if name.rstrip("_") in _PLACES or name == "__setitem__":
            return hasattr(args[0], _MOVED)
        given = list(_tensors(args, kwargs))
        if name in _MOVES and all(
            any(id(each) not in self._shared for each in part) for part in (given[:1], given[1:])
        ):
            return True
        return any(hasattr(tensor, _MOVED) for tensor in given)

    def _backward(self, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        """With this mode on, for what activation checkpointing runs again: the call itself would go on without it."""
        tensors = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        given = (None,) * len(tensors) if grad_tensors is None else grad_tensors
        given = (given,) if isinstance(given, Tensor) else given
        edges = [torch.autograd.graph.get_gradient_edge(each) for each in tensors]
        starts = [torch.ones_like(each) if start is None else start for each, start in zip(tensors, given, strict=True)]
        with self:
            torch.autograd.backward(edges, starts, *args, **kwargs)

    def _derive(self, func: Any, args: Any, kwargs: Any, any_source: bool) -> Any:
        name = name_of(func)
        if any_source and name in BROADCASTS:
            use = self._new_use(func, args, kwargs)
            if self._is_broadcast(use):
                return self._reported(use, func(*args, **kwargs))
        if any_source and _changes_its_argument(func):
            raise NotFollowedError(f"{name}() changes a tensor in place with a parameter, before the batch comes in")
        out = func(*args, **kwargs)
        outputs = out if isinstance(out, tuple | list) else (out,)
        if any(isinstance(each, Tensor) for each in outputs):
            with_source = any_source and name not in _CUTS
            parents = self._sources(args, kwargs) if with_source else ()
            for index, each in enumerate(outputs):
                if isinstance(each, Tensor) and id(each) not in self._shared:
                    source = None
                    if with_source and is_differentiable(each):
                        source = Source(each, func, name, args, kwargs, index if outputs is out else -1, parents)
                    self._shared[id(each)] = (each, source)
        return out

    def _use(self, func: Any, args: Any, kwargs: Any) -> Any:
        if name_of(func) == "__getitem__" and _is_scalar_index(args[1]):
            # One expert's weights: which one depends on the batch, but they are the same for all who use them.
            index = args[1].item() if isinstance(args[1], Tensor) else tuple(_item(each) for each in args[1])
            return self._derive(func, (args[0], index), {}, True)
        in_place = _changes_its_argument(func)
        if in_place and (entry := self._shared.pop(id(args[0]), None)) is not None and entry[1] is not None:
            raise NotFollowedError(f"{name_of(func)}() changes in place what is made of parameters alone")
        use = self._new_use(func, args, kwargs, keep=in_place and torch.is_grad_enabled())
        use.is_moved = self._is_moved(func, args, kwargs)
        out = self._reported(use, func(*args, **kwargs))
        return _marked(out) if use.is_moved else out

    def _new_use(self, func: Any, args: Any, kwargs: Any, keep: bool = False) -> Use:
        leaves, structure = _flattened(args, kwargs)
        sources: dict[int, Source] = {}
        for position, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                source = self._shared.get(id(leaf), (None, None))[1]
                if source is not None:
                    sources[position] = source
                else:
                    leaves[position] = leaf.detach().clone() if keep else leaf.detach()
        return Use(func, name_of(func), leaves, structure, sources)

    def _reported(self, use: Use, out: Any) -> Any:
        outputs = out if isinstance(out, tuple | list) else (out,)
        first = next((each for each in outputs if is_differentiable(each)), None)
        if first is None:
            return out
        assert use.leaves is not None
        use.shape = first.shape
        use.versions = tuple(leaf._version if isinstance(leaf, Tensor) else 0 for leaf in use.leaves)
        device = first.device.type
        use.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return self._on_use(use, out)

    def _sources(self, args: Any, kwargs: Any) -> tuple[Source, ...]:
        found = (self._shared[id(tensor)][1] for tensor in _tensors(args, kwargs))
        return tuple(dict.fromkeys(source for source in found if source is not None))


_BACKWARDS = frozenset({torch.autograd.backward, Tensor.backward})
_DROPOUTS = {functional.dropout: 1, functional.scaled_dot_product_attention: 4}  # where the probability is


def _refuse_dropout(func: Any, args: Any, kwargs: Any) -> None:
    place = _DROPOUTS[func]
    probability = args[place] if len(args) > place else kwargs.get("p", kwargs.get("dropout_p", 0.0))
    training = args[2] if len(args) > 2 and place == 1 else kwargs.get("training", True)
    if probability and training:
        raise ValueError(
            f"{func.__name__}() applies dropout, as in training mode: its gradients are random; call model.eval() first"
        )


def is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def name_of(func: Any) -> str:
    """`linear`, `mul`; of a property, the property's."""
    name = getattr(func, "__name__", type(func).__name__)
    return func.__self__.__name__ if name == "__get__" else name


def _flattened(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    leaves = [*args, *kwargs.values()]
    if any(isinstance(leaf, tuple | list) and next(_tensors(leaf, None), None) is not None for leaf in leaves):
        return tree_flatten((args, kwargs))
    return leaves, _Flat(len(args), tuple(kwargs))


def _marked(out: Any) -> Any:
    for each in out if isinstance(out, tuple | list) else (out,):
        if isinstance(each, Tensor):
            setattr(each, _MOVED, True)
    return out


def _with_anchor(out: Tensor, func: Any) -> Tensor:
    starts = torch.is_grad_enabled() and out.is_floating_point() and not out.requires_grad
    if not starts or _changes_its_argument(func) or isinstance(out, torch.nn.Parameter):
        return out
    return out + anchor_of(out)


def anchor_of(out: Tensor) -> Tensor:
    """A zero that needs a gradient: where it is added, a graph begins."""
    return torch.zeros((), device=out.device, dtype=out.dtype, requires_grad=True)


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value, None)


def _changes_its_argument(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name != "requires_grad_")


def _is_scalar_index(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part.dim() == 0 and not part.is_floating_point() and part.dtype != torch.bool
        if isinstance(part, Tensor)
        else isinstance(part, int | slice)
        for part in parts
    )


def _item(part: Any) -> Any:
    return part.item() if isinstance(part, Tensor) else part
