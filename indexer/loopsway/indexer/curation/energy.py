"""How much influence goes through each step of the loop: SDI energy and signed share, with standard errors.

Q queries, S steps, N examples, n of a block, G groups of coordinates, W width, M pairs of query and step.

The energy of a step is the sum of |influence| over the training examples, its signed sum that of influences (Kaissis et
al. 2026, figures 2 and 3). Sketch noise makes |estimates| larger than they are, by most of the energy where influences
are small. So the W coordinates of rotated sketches, which are near independent, are taken in G groups: each group's
estimate of an influence is multiplied by the sign that the other groups give it. Noise by itself has no such energy,
and what lies within a standard error of zero has too little: the truth is between it and the sum of |estimates|.

The spread over groups gives the standard errors; shares get theirs by leaving one group out at a time (the jackknife).
Energies of groups depend on each other through the signs, the more the more is noise: `_widened` has what simulation
gives for 16 groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..config import Resolve
from ..search.filters import matching_rows
from ..search.index import Index
from ..search.queries import checked_sketches, query_vectors
from ..search.ranking import pairs

GROUPS = 16
TILE_ROWS = 512
TOGETHER = 256  # pairs of query and step in one pass


@dataclass(frozen=True, kw_only=True, eq=False)
class Estimate:
    """Numbers and their standard errors, float64, of one shape."""

    values: np.ndarray
    standard_errors: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class StepEnergies:
    """Of each of Q queries at each of S steps.

    Attributes:
        energies: [Q, S], sum over examples of |influence|, in units of loss; none of it is noise.
        signed_sums: [Q, S], sum over examples of the influence.
        shares: [Q, S], of the query's energy over all steps; they add up to 1.
        signed_shares: [Q, S], signed sum over the query's energy over all steps.
        raw_energies: float64 [Q, S], sum over examples of |estimate|, noise included.
    """

    energies: Estimate
    signed_sums: Estimate
    shares: Estimate
    signed_shares: Estimate
    raw_energies: np.ndarray


def step_energies(
    index: Index, query_sketches: Any, resolve: Resolve = "query_step", *, where: str | None = None
) -> StepEnergies:
    """SDI energy and signed share of each step.

    Args:
        index: open.
        query_sketches: float32 [T, W] or [Q, T, W].
        resolve: whose steps, as in `Index.search`.
        where: a filter over the examples that are summed over; None: all.

    Raises:
        FilterError, ValueError: as `Index.search`.
    """
    sketches, _ = checked_sketches(query_sketches, index.width)
    wanted = pairs(resolve, index.num_steps, sketches.shape[1])
    vectors = query_vectors(sketches, index.config)
    rows = index.sketched_rows()
    if where is not None:
        rows = rows[matching_rows(index.examples, where)[rows]]
    kept = np.zeros(index.num_rows, bool)
    kept[rows] = True
    groups, energies, signed, raw = math.gcd(GROUPS, index.width), [], [], []
    for slot in sorted({pair.slot for pair in wanted}, key=lambda slot: -1 if slot is None else slot):
        mine = [pair.query for pair in wanted if pair.slot == slot]
        queries = torch.from_numpy(vectors[:, mine].reshape(-1, index.width))
        sums = [_sums(index, slot, part, kept, groups) for part in queries.split(TOGETHER)]
        for found, values in zip((energies, signed, raw), zip(*sums, strict=True), strict=True):
            found.append(np.concatenate(values, axis=-1).reshape(*values[0].shape[:-1], len(sketches), len(mine)))
    energy, sums = (np.concatenate(each, axis=2) for each in (energies, signed))  # [G, Q, S]
    with_noise = np.concatenate(raw, axis=1)
    noise = 1 - np.divide(energy.mean(0), with_noise, out=np.ones_like(with_noise), where=with_noise > 0).clip(0, 1)
    return StepEnergies(
        energies=_widened(_mean(energy), noise),
        signed_sums=_mean(sums),
        shares=_widened(_jackknife(energy, energy), noise),
        signed_shares=_jackknife(sums, energy),
        raw_energies=with_noise,
    )


def _sums(
    index: Index, slot: int | None, queries: torch.Tensor, kept: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each group's estimate of the energies and of the signed sums, [G, M], and the raw energies, [M]."""
    count = len(queries)
    grouped = queries.view(count, groups, -1).permute(1, 2, 0)  # [G, W / G, M]
    energy, signed = (torch.zeros(groups, count, dtype=torch.float64) for _ in range(2))
    raw = torch.zeros(count, dtype=torch.float64)
    for block in index.blocks():
        rows = np.flatnonzero(kept[block.start : block.stop]) + block.start
        for start in range(0, len(rows), TILE_ROWS):
            decoded = torch.from_numpy(index.codes.decoded(slot, rows[start : start + TILE_ROWS]))
            parts = decoded.view(len(decoded), groups, -1).transpose(0, 1) @ grouped  # [G, n, M]
            whole = parts.sum(0)
            signs = torch.sign(whole - parts)
            energy += groups * (signs * parts).sum(1, dtype=torch.float64)
            signed += groups * parts.sum(1, dtype=torch.float64)
            raw += whole.abs().sum(0, dtype=torch.float64)
    return energy.numpy(), signed.numpy(), raw.numpy()


def _mean(estimates: np.ndarray) -> Estimate:
    """Of groups, the first dimension."""
    groups = len(estimates)
    return Estimate(values=estimates.mean(0), standard_errors=estimates.std(0, ddof=1) / math.sqrt(groups))


def _widened(estimate: Estimate, noise: np.ndarray) -> Estimate:
    """With the standard errors of energies of which a part, from 0 to 1, is noise."""
    return replace(estimate, standard_errors=estimate.standard_errors * np.sqrt(1 + 2.15 * noise ** (1 / 3)))


def _jackknife(parts: np.ndarray, wholes: np.ndarray) -> Estimate:
    """Parts / (wholes summed over steps), [G, Q, S]; 0 where there is no energy."""
    groups = len(parts)

    def shares(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
        over = whole.sum(-1, keepdims=True)
        return np.divide(part, over, out=np.zeros_like(part), where=over != 0)

    without = np.stack(
        [shares(np.delete(parts, each, 0).mean(0), np.delete(wholes, each, 0).mean(0)) for each in range(groups)]
    )
    spread = ((without - without.mean(0)) ** 2).sum(0) * (groups - 1) / groups
    return Estimate(values=shares(parts.mean(0), wholes.mean(0)), standard_errors=np.sqrt(spread))
