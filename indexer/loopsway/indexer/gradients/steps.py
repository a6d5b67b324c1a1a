"""Which step of the loop a moment of the forward pass belongs to.

The marker is the first body module that is entered, or the one that the user names; each time it is entered a step
begins. What happens from then on belongs to that step, until the last call of a body module is over: before the first
step and after that last call lies what is *outside* the loop.

Reentrant activation checkpointing runs parts of the forward pass under no_grad and once more inside the backward pass.
`recomputed` finds what was noted there by the sequence number that autograd gave to the checkpoint's node.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

BEFORE = -1


@dataclass(frozen=True)
class Moment:
    """When a parameter was used: during `step` (BEFORE: before the first), as the `clock`-th thing noted."""

    step: int
    clock: int


class Steps:
    """Counts the steps of one forward pass.

    Args:
        marker: whose every entry begins a step; None: the first of `roots` that is entered.
        roots: the body's modules.
        on_change: called whenever a step begins or a body module's call is over.
    """

    def __init__(
        self, marker: nn.Module | None, roots: Sequence[nn.Module], on_change: Callable[[], None] | None = None
    ) -> None:
        self._marker, self._roots, self._on_change = marker, roots, on_change
        self.in_forward = True
        self.has_recomputed = False
        self.num_steps = 0
        self._clock = self._end = 0  # the end: when the last call of a body module was over
        self._called: set[nn.Module] = set()
        self._exits: dict[nn.Module, int] = {}  # of each root, when its last call was over
        self._inner_exits: dict[nn.Module, int] = {}  # when that of any module in it was
        self._without_graph: dict[int, list[Moment]] = defaultdict(list)
        self._replayed: dict[int, int] = defaultdict(int)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hooks on the marker and the roots meanwhile."""
        entered = list(self._roots)
        if self._marker is not None and self._marker not in entered:
            entered.append(self._marker)
        handles = [module.register_forward_pre_hook(partial(self._enter, module), prepend=True) for module in entered]
        for root in self._roots:
            handles += [module.register_forward_hook(partial(self._leave, root)) for module in root.modules()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def note(self) -> Moment:
        """The present moment of the forward pass."""
        self._clock += 1
        moment = Moment(self.num_steps - 1, self._clock)
        if not torch.is_grad_enabled():
            following = torch._C._autograd._get_sequence_nr()  # pyright: ignore[reportAttributeAccessIssue]
            self._without_graph[following].append(moment)
        return moment

    def recomputed(self) -> Moment | None:
        """The moment of the forward pass that the present one repeats; None where nothing has to be noted again.

        A checkpoint's node is made just before its forward runs, and nothing else gets a number until it is over.
        """
        node = torch._C._current_autograd_node()
        first = node._sequence_nr() + 1 if node is not None else -1
        moments, turn = self._without_graph.get(first, ()), self._replayed[first]
        self._replayed[first] += 1
        if turn >= len(moments):
            return None
        self.has_recomputed = True
        return moments[turn]

    def begin_backward(self) -> None:
        self.in_forward = False
        self._end = self._last_exit()
        self._replayed.clear()

    def slot(self, moment: Moment, *, outside: bool) -> int | None:
        """The moment's row among the slots; None where it lies outside the loop and `outside` is not wanted.

        The steps come first, then `before` and `after`. Known once the backward pass has begun.
        """
        if moment.step == BEFORE:
            return self.num_steps if outside else None
        if moment.clock > self._end:
            return self.num_steps + 1 if outside else None
        return moment.step

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if not self.in_forward:
            return
        self._called.add(module)
        if self._marker is None:
            self._marker = module
        if module is self._marker:
            self.num_steps += 1
            self._changed()

    def _leave(self, root: nn.Module, module: nn.Module, *_: Any) -> None:
        if not self.in_forward:
            return
        if module is root:
            self._exits[root] = self._clock
        self._inner_exits[root] = self._clock
        if module is root or root not in self._called:
            self._changed()

    def _last_exit(self) -> int:
        """A root whose own forward is never called, but its parts' are, is left with the last of them."""
        exits = [(self._exits if root in self._called else self._inner_exits).get(root, 0) for root in self._roots]
        return max(exits, default=0)

    def _changed(self) -> None:
        if self._on_change is not None:
            self._on_change()
