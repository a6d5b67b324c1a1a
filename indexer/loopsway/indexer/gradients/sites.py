"""What was learned of each place where parameters are used: whose its entries are, and how its call is split.

A place is traced (`owners.py`) until one arrangement alone agrees with everything seen there. A place that rows reach
in an order that depends on the batch, as behind a router or without padding, is traced in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .backward import Split
from .owners import Axis, Owners, axes_that_fit, rows_of
from .uses import Use


@dataclass(eq=False)
class Site:
    """One place.

    Attributes:
        axes: arrangements that agree with all that was seen; None before anything was.
        split: of a call without a rule.
        has_rule: its gradients were told by a rule: the call need not be split.
        is_moved: rows came here in an order that depends on the batch.
        traces_all: one use of a batch did not tell how the others are arranged.
        is_shared: an expansion that turned out to be the same for all examples.
    """

    axes: list[Axis] | None = None
    split: Split | None = None
    is_shared: bool = False
    has_rule: bool = False
    is_moved: bool = False
    traces_all: bool = False

    def is_known(self) -> bool:
        return not self.is_moved and self.axes is not None and len(self.axes) == 1

    def owners(self, use: Use, batch: int) -> Owners | None:
        """Of the use's output; None when they have to be traced."""
        if batch == 1:
            return Axis(0)
        if self.is_known() and self.axes and self.axes[0].fits(use.shape, batch):
            return self.axes[0]
        return None

    def needs_output(self) -> bool:
        return self.split is None and not self.has_rule

    def learn(self, owner: Tensor, batch: int) -> Owners:
        """Takes in who owns the entries of one output.

        Raises:
            MixedExamplesError: entries of one row belong to several examples.
        """
        fitting = axes_that_fit(owner, batch)
        self.axes = fitting if self.axes is None else [axis for axis in self.axes if axis in fitting]
        return fitting[0] if fitting else rows_of(owner)


@dataclass(eq=False)
class Sites:
    """All places of one model."""

    known: dict[tuple[Any, ...], Site] = field(default_factory=dict)

    def of(self, use: Use) -> Site:
        site = self.known.setdefault(use.site(), Site())
        site.is_moved |= use.is_moved
        return site
