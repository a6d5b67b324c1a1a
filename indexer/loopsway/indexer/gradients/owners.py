"""Which example of the batch each entry of an intermediate tensor belongs to.

B examples. Most tensors have the batch as their first dimension, but not all: attention may run tokens first, layers
may flatten batch and tokens, and routing gathers any rows in any order. So ownership is not guessed from shapes: it is
read off two backward passes. If example b's loss is weighted by c_b, every gradient entry that belongs to it is
multiplied by c_b; with powers of two that is exact in floating point, and the ratio names the owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIGIT = 64  # weights 2^-32 .. 2^31 tell as many examples apart in one pass
DIGIT_HALF = 8  # of float16, whose range is small: weights 1 .. 2^7
FOREIGN_ENERGY = 1e-5  # share of a gradient's energy that may be rounding and have no clear owner


class MixedExamplesError(ValueError):
    """Entries of one gradient depend on several examples' losses."""


@dataclass(frozen=True)
class Axis:
    """The examples lie along one dimension, each as a run of it, or (minor) one entry of every B."""

    axis: int
    minor: bool = False

    def fits(self, shape: Sequence[int], batch: int) -> bool:
        return self.axis < len(shape) and shape[self.axis] % batch == 0

    def front(self, values: Tensor, batch: int) -> Tensor:
        """[.., n, ..] as [B, .., n / B, ..]."""
        size = values.shape[self.axis] // batch
        if self.minor:
            return values.unflatten(self.axis, (size, batch)).movedim(self.axis + 1, 0)
        values = values.unflatten(self.axis, (batch, size))
        return values.movedim(self.axis, 0) if self.axis else values

    def expected(self, shape: Sequence[int], batch: int, device: torch.device) -> Tensor:
        """The owner of each entry, broadcastable to `shape`."""
        index = torch.arange(shape[self.axis], device=device)
        owner = index % batch if self.minor else index // (shape[self.axis] // batch)
        return owner.view([-1 if axis == self.axis else 1 for axis in range(len(shape))])

    def select(self, index: int) -> Axis | None:
        """Of `values[index]`."""
        return None if self.axis == 0 else Axis(self.axis - 1, self.minor)

    def __str__(self) -> str:
        return f"dimension {self.axis}{' (minor)' if self.minor else ''}"


@dataclass(frozen=True, eq=False)
class Rows:
    """Any leading entries may belong to any example: `owner` has the leading dimensions' shape, -1 for nobody."""

    owner: Tensor

    def front(self, values: Tensor, batch: int) -> Tensor:
        """[.., rest] as [B, R, rest]: each example's rows, with zeros up to the longest."""
        rows = values.flatten(0, self.owner.dim() - 1) if self.owner.dim() else values[None]
        owner = self.owner.flatten()
        kept = (owner >= 0).nonzero().squeeze(1)
        kept = kept[owner[kept].argsort(stable=True)]
        counts = torch.bincount(owner[kept], minlength=batch)
        starts = counts.cumsum(0) - counts
        places = torch.arange(len(kept), device=owner.device) - starts[owner[kept]]
        out = values.new_zeros(batch, max(1, int(counts.max())), *rows.shape[1:])
        out[owner[kept], places] = rows[kept]
        return out

    def select(self, index: int) -> Rows:
        return Rows(self.owner[index])

    def __str__(self) -> str:
        return "rows traced in each batch"


Owners = Axis | Rows


def weights(batch: int, place: int, digit: int, device: torch.device) -> Tensor:
    """c_b of the pass that tells the `place`-th digit of b, [B]; powers of two."""
    digits = torch.arange(batch, device=device) // digit**place % digit
    return torch.ldexp(torch.ones(batch, device=device), digits - _offset(digit))


def num_places(batch: int, digit: int) -> int:
    places = 1
    while digit**places < batch:
        places += 1
    return places


def digits_of(plain: Tensor, weighted: Tensor, digit: int) -> Tensor:
    """Each entry's digit by the ratio of its two gradients; -1 where the gradient is zero.

    Raises:
        MixedExamplesError: the ratios are not those of single examples.
    """
    plain, weighted = plain.float(), weighted.float()
    present = plain.abs() > (torch.finfo(torch.float16).tiny if digit == DIGIT_HALF else 1e-30)
    ratio = torch.where(present, weighted / plain, 1.0)
    exponent = ratio.abs().log2()
    found = exponent.round() + _offset(digit)
    clear = (ratio > 0) & ((exponent + _offset(digit) - found).abs() < 0.02) & (found >= 0) & (found < digit)
    energy = plain.square()
    if energy[present & ~clear].sum() > FOREIGN_ENERGY * energy.sum():
        raise MixedExamplesError("entries depend on several examples")
    return torch.where(present & clear, found.long(), -1)


def _offset(digit: int) -> int:
    """What is taken from a digit to have an exponent."""
    return digit // 2 if digit == DIGIT else 0


def axes_that_fit(owner: Tensor, batch: int) -> list[Axis]:
    """Every regular arrangement that agrees with what is known of the owners."""
    known, shape = owner >= 0, owner.shape
    found = []
    for axis, size in enumerate(shape):
        if size % batch:
            continue
        for minor in (False, True) if size > batch else (False,):
            candidate = Axis(axis, minor)
            if (candidate.expected(shape, batch, owner.device) == owner)[known].all():
                found.append(candidate)
    return found


def rows_of(owner: Tensor) -> Rows:
    """Owners of the leading dimensions, where an entry's owner depends on no other.

    Raises:
        MixedExamplesError: one row's entries belong to several examples.
    """
    if owner.dim() < 2:
        return Rows(owner)
    highest = owner.amax(-1)
    lowest = torch.where(owner >= 0, owner, highest.unsqueeze(-1)).amin(-1)
    if not torch.equal(lowest, highest):
        raise MixedExamplesError("entries of one row belong to several examples")
    return Rows(highest)
