"""How alike two stored gradients are, from their codes alone.

n and m rows, W width, L stored values of a row.

Coordinates of two rotated sketches are near Gaussian pairs whose correlation is the gradients' cosine rho. Codes of few
bits agree less than the sketches do: g(rho) = E[c(u) c(v)] / E[c(u)^2] for coded pairs, which is undone. For sign bits
it is the arcsine law, 2/pi asin(rho) (Van Vleck and Middleton 1966), so that rho = sin(pi/2 g), as in SimHash (Charikar
2002); for 2 and 4 bits it is integrated numerically; from 8 bits on, g is rho times what coding keeps of a variance.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numkong
import numpy as np
import torch

from ..sketches.coding import GAUSSIAN_STEP, decode, variance_factor

FINEST = 8  # bits from which coding is noise of its own beside a sketch
SPACING = 0.016  # of the grid that is integrated on, in standard deviations


def agreements(codes: np.ndarray, others: np.ndarray, bits: int) -> np.ndarray:
    """Correlation g of each pair of codes, [n, L] and [m, L], float32 [n, m]; with a row of zeros it is 0."""
    if bits == 1:
        differing = np.asarray(numkong.hammings_packed(codes, numkong.hammings_pack(others)))
        return 1 - differing.astype(np.float32) * np.float32(2 / (8 * codes.shape[1]))
    values, compared = (_unit(each, bits) for each in (codes, others))
    return (values @ compared.T).float().numpy()


def cosines(agreement: np.ndarray, bits: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Estimates of the gradients' cosines, and their standard errors, of the sketch and its coding."""
    g = np.clip(agreement.astype(np.float64), -1, 1)
    if bits == 1:
        cosine, spread = np.sin(np.pi / 2 * g), np.pi / 2 * np.cos(np.pi / 2 * g) * np.sqrt(1 - g * g)
    elif bits >= FINEST:
        lost = variance_factor(bits) - 1
        cosine = np.clip(g * (1 + lost), -1, 1)
        spread = 1 - cosine * cosine + lost
    else:
        angles, agreeing, spreads = _coded_pairs(bits)
        cosine, spread = np.sin(np.interp(g, agreeing, angles)), np.interp(g, agreeing, spreads)
    return cosine.astype(np.float32), (spread / math.sqrt(width)).astype(np.float32)


def _unit(codes: np.ndarray, bits: int) -> torch.Tensor:
    """Float64, so that rounding does not depend on what is multiplied beside."""
    values = torch.from_numpy(decode(codes, np.ones(len(codes), np.float32), bits)).double()
    return torch.nn.functional.normalize(values, dim=1)


@lru_cache
def _coded_pairs(bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of unit Gaussian pairs: asin(rho) from -pi/2 to pi/2, g(rho), and the spread that one pair's estimate of rho has.

    With a = c(u) / sqrt(E c^2) and b = c(v) / sqrt(E c^2), the g of W pairs varies as the mean of z = a b - g (a^2 +
    b^2) / 2 does; the spread is that of z, times the slope of rho(g).
    """
    step, half = GAUSSIAN_STEP[bits], 1 << (bits - 1)
    fine = step / math.ceil(step / SPACING)
    u = (torch.arange(int(-7 / fine), int(7 / fine), dtype=torch.float64) + 0.5) * fine  # no cell of a code is split
    weight = torch.exp(-u * u / 2)
    weight /= weight.sum()
    levels = 2 * torch.arange(2 * half, dtype=torch.float64) - (2 * half - 1)
    cells = (u / step + half).floor().long().clamp(0, 2 * half - 1)
    levels /= (weight * levels[cells] ** 2).sum().sqrt()
    a, b = levels[cells][:, None], levels[None]
    edges = (torch.arange(1, 2 * half, dtype=torch.float64) - half) * step
    angles = np.linspace(-np.pi / 2, np.pi / 2, 201)  # to which g is almost linear
    agreeing, spreads = [], []
    for rho in np.sin(angles[1:-1]):
        above = torch.special.ndtr((rho * u[:, None] - edges) / math.sqrt(1 - rho * rho))  # P(v above each edge | u)
        above = torch.nn.functional.pad(torch.nn.functional.pad(above, (1, 0), value=1.0), (0, 1))
        pairs = weight[:, None] * (above[:, :-1] - above[:, 1:])  # P(u, c(v)), [u, levels]
        g = float((pairs * a * b).sum())
        agreeing.append(g)
        spreads.append(math.sqrt(float((pairs * (a * b - g / 2 * (a * a + b * b)) ** 2).sum())))
    agreements = np.array([-1.0, *agreeing, 1.0])
    return angles, agreements, np.cos(angles) * np.gradient(angles, agreements) * np.array([0.0, *spreads, 0.0])
