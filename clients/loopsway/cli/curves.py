"""Trajectories to draw: the strongest influences on one query, step by step, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One training example's influence on a query at each step.

    Attributes:
        label: what the example is called: its description, or its id.
        total: its influence over the whole loop; the sign says proponent or opponent.
        influences: one for each step.
        standard_errors: one for each step, in the influences' unit.
    """

    label: str
    total: float
    influences: Sequence[float]
    standard_errors: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What a chart or a figure shows.

    Attributes:
        title: what was asked.
        axis: what the steps are steps of.
        curves: proponents first, strongest first.
        without_gradient: steps whose zeros are an artefact of how the model was trained.
    """

    title: str
    axis: str
    curves: Sequence[Curve]
    without_gradient: Sequence[int] = ()


def shortened(text: str, length: int) -> str:
    """The text on one line and cut to `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"


def number(value: float, *, digits: int = 3, signed: bool = False) -> str:
    """The value in so many digits, or in whole ones from a thousand to a million."""
    sign = "+" if signed else ""
    return f"{value:{sign},.0f}" if 1000 <= abs(value) < 1e6 else f"{value:{sign}.{digits}g}"
