"""The generic rule: a use of any function runs backwards once for each example, all at once under vmap.

B examples. Which of the other arguments are split among the examples, and along which dimension, is not known: the
likely arrangements are tried until the call, split, gives what it gave as a whole.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .forms import Dense, Gradient, in_full
from .owners import Axis
from .uses import NotFollowedError, Source, Use, is_differentiable

Split = tuple[int | None, ...]  # of each leaf of the arguments: the dimension that is split, None for none
MAX_TRIES = 64


def split_of(use: Use, output: Tensor, owners: Axis, batch: int) -> Split:
    """How the call's arguments are split.

    Args:
        use: with its leaves.
        output: of the whole call, the one that `owners` speaks of.
        owners: of the output's entries.
        batch: B.

    Raises:
        NotFollowedError: there is none.
    """
    assert use.leaves is not None
    choices = [_choices(leaf, at in use.sources, output, owners, batch) for at, leaf in enumerate(use.leaves)]
    want = owners.front(output.detach(), batch)
    for split in itertools.islice(itertools.product(*choices), MAX_TRIES):
        try:
            got = _forward(use, split, owners, batch)
        except Exception:
            continue
        if got.shape == want.shape and torch.allclose(got, want, rtol=_tolerance(output), atol=1e-5):
            return split
    raise NotFollowedError(f"{use.name}() can't be split among the examples")


def gradients(
    use: Use, split: Split, output_gradients: Sequence[Tensor | None], owners: Axis, batch: int
) -> Iterator[tuple[Source, Gradient]]:
    """Of every shared tensor in the call.

    Args:
        use: with its leaves.
        split: as `split_of` found.
        output_gradients: of the call's differentiable outputs, in order; None stands for zero.
        owners: of the outputs' entries.
        batch: B.
    """
    sources = list(dict.fromkeys(use.sources.values()))
    inputs = tuple(source.tensor.detach() for source in sources)
    places = {at: sources.index(source) for at, source in use.sources.items()}
    fronts, dims = _fronts(use, split, owners, batch)
    cotangents = [None if each is None else owners.front(each, batch) for each in output_gradients]
    present = [each for each in cotangents if each is not None]

    def one(own: list[Any], given: list[Tensor]) -> Any:
        def call(*shared: Tensor) -> tuple[Tensor, ...]:
            outputs = _call(use, [shared[places[at]] if at in places else leaf for at, leaf in enumerate(own)])
            return tuple(each for each, cotangent in zip(outputs, cotangents, strict=True) if cotangent is not None)

        outputs, backward = torch.func.vjp(call, *inputs)[:2]
        return backward(tuple(each.to(out.dtype) for each, out in zip(given, outputs, strict=True)))

    try:
        with _quiet(), _autocast(use, present[0].device):
            found = torch.func.vmap(one, in_dims=(dims, [0] * len(present)))(fronts, present)
    except RuntimeError as error:
        raise NotFollowedError(f"{use.name}() does not run backwards under vmap: {error}") from error
    for source, rows in zip(sources, found, strict=True):
        yield source, Dense(in_full(rows).reshape(batch, -1))


def differentiable(outputs: Any) -> list[Tensor]:
    """The outputs of a call that have gradients, in order."""
    flat = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return [each for each in flat if is_differentiable(each)]


def _choices(leaf: Any, is_source: bool, output: Tensor, owners: Axis, batch: int) -> list[int | None]:
    """Left aligned with the output, right aligned, anywhere else, not at all."""
    if not isinstance(leaf, Tensor) or is_source:
        return [None]
    size = output.shape[owners.axis]
    likely = [owners.axis, owners.axis - output.dim() + leaf.dim(), *range(leaf.dim())]
    exact = [at for at in likely if 0 <= at < leaf.dim() and leaf.shape[at] == size]
    others = [at for at in range(leaf.dim()) if leaf.shape[at] % batch == 0 and leaf.shape[at] != size]
    return [*dict.fromkeys(exact), None, *others]


def _fronts(use: Use, split: Split, owners: Axis, batch: int) -> tuple[list[Any], list[int | None]]:
    assert use.leaves is not None
    leaves: list[Any] = []
    for at, (leaf, axis) in enumerate(zip(use.leaves, split, strict=True)):
        if at in use.sources:
            leaves.append(0)
        elif axis is None:
            leaves.append(leaf)
        else:
            leaves.append(Axis(axis, owners.minor).front(use.data(leaf), batch))
    return leaves, [None if axis is None else 0 for axis in split]


def _forward(use: Use, split: Split, owners: Axis, batch: int) -> Tensor:
    fronts, dims = _fronts(use, split, owners, batch)
    shared = {at: source.tensor.detach() for at, source in use.sources.items()}

    def one(own: list[Any]) -> Tensor:
        return _call(use, [shared.get(at, leaf) for at, leaf in enumerate(own)])[0]

    if not any(axis is not None for axis in split):
        raise NotFollowedError("nothing is split")
    device = next(iter(shared.values())).device
    with torch.no_grad(), _quiet(), _autocast(use, device):
        return torch.func.vmap(one, in_dims=(dims,))(fronts)


def _call(use: Use, leaves: list[Any]) -> list[Tensor]:
    args, kwargs = use.arguments(leaves)
    return differentiable(use.function(*args, **kwargs))


def _autocast(use: Use, device: torch.device) -> AbstractContextManager[Any]:
    return nullcontext() if use.autocast is None else torch.autocast(device.type, dtype=use.autocast)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without vmap's word that a function has no batching rule and is slow: the plan shows what is slow."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop")
        yield


def _tolerance(output: Tensor) -> float:
    return 5e-2 if output.dtype in (torch.float16, torch.bfloat16) else 1e-3
