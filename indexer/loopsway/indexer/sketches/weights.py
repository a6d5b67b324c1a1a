"""Which checkpoints' weights are in memory: as many as a budget allows; those that were not used for longest leave.

A model whose weights leave stays as an object, with all that was learned of it: its tensors are emptied, and later take
over those of the same checkpoint, loaded anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator

import torch
from torch import Tensor, nn

from ..task import TaskError

_log = logging.getLogger(__name__)


class WeightMemory:
    """A budget that several models share. Not thread-safe.

    A model that is larger than the whole budget is held alone, with a warning: to refuse it would make an index
    unusable that one can search well, if with less room than was wished for.

    Args:
        budget_bytes: of all weights that are held. None: no bound.
    """

    def __init__(self, budget_bytes: int | None = None) -> None:
        if budget_bytes is not None and budget_bytes <= 0:
            raise ValueError(f"budget_bytes is {budget_bytes}, expected > 0, or None for no bound")
        self._budget = budget_bytes
        self._held: dict[Hashable, tuple[int, Callable[[], None]]] = {}  # the last used last

    @property
    def num_held(self) -> int:
        return len(self._held)

    @property
    def held_bytes(self) -> int:
        return sum(size for size, _ in self._held.values())

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def use(self, key: Hashable) -> bool:
        """Whether it is held; it is the last used from now on."""
        if key not in self._held:
            return False
        self._held[key] = self._held.pop(key)
        return True

    def make_room(self, size_bytes: int) -> None:
        """Lets weights leave until so many bytes fit."""
        while self._budget is not None and self._held and self.held_bytes + size_bytes > self._budget:
            self.drop(next(iter(self._held)))

    def hold(self, key: Hashable, size_bytes: int, release: Callable[[], None]) -> None:
        """Notes weights that were loaded; `release` frees them."""
        self.make_room(size_bytes)
        if self._budget is not None and size_bytes > self._budget:
            _log.warning("a model of %d bytes is larger than the budget of %d bytes: it is held alone", size_bytes,
                         self._budget)  # fmt: skip
        self._held[key] = (size_bytes, release)

    def drop(self, key: Hashable) -> None:
        """Frees these weights, if they are held."""
        if key in self._held:
            _, release = self._held.pop(key)
            release()

    def clear(self) -> None:
        """Frees all."""
        for key in list(self._held):
            self.drop(key)


def size_of(model: nn.Module) -> int:
    """Bytes of its parameters and buffers; what they share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for _, tensor in _tensors(model)}
    return sum(storages.values())


def empty(model: nn.Module) -> None:
    """Frees its parameters and buffers."""
    for _, tensor in _tensors(model):
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def fill(model: nn.Module, loaded: nn.Module) -> None:
    """Gives an emptied model the tensors of another of its kind.

    Raises:
        TaskError: it is the emptied one itself, or has other parameters or buffers.
    """
    if loaded is model:
        raise TaskError("model() gave the same object as before, whose weights have left memory: it has to load anew")
    ours, theirs = dict(_tensors(model)), dict(_tensors(loaded))
    if ours.keys() != theirs.keys():
        names = sorted(ours.keys() ^ theirs.keys())
        raise TaskError(f"model() gave other weights than the first time: {', '.join(names)} were not in both")
    for name, tensor in ours.items():
        tensor.data = theirs[name].data


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
