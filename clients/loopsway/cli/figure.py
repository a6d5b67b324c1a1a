"""Trajectories as an image file. Knows matplotlib, without its global state and without a display."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from .curves import Curves, number, shortened

FORMATS = (".png", ".svg", ".pdf")
# Told apart by people who can't tell red from green: blues helped, oranges hurt.
PROPONENT_COLOURS = ("#08306b", "#2171b5", "#4fa3d9", "#1b9e91", "#5e4fa2")
OPPONENT_COLOURS = ("#7f2704", "#d94801", "#f79646", "#b3446c", "#c9a227")
LABEL_LENGTH = 44


# Beyond this ratio of the largest influence to the median one, most steps would be a flat line on a linear scale.
WIDE_RANGE = 20.0


def save(curves: Curves, path: Path) -> None:
    """Draws the curves with bands of two standard errors, and writes PNG, SVG or PDF by the path's suffix."""
    # Its own types are too partial for a strict check.
    matplotlib: Any = importlib.import_module("matplotlib")
    from matplotlib.figure import Figure

    # A description may hold a dollar sign: it must not become a formula.
    settings = {"svg.hashsalt": "loopsway", "font.size": 10.0, "text.parse_math": False}
    with matplotlib.rc_context(settings):
        figure: Any = Figure(figsize=(9.0, 4.2), dpi=160, layout="constrained")
        axes = figure.add_subplot()
        _draw(axes, curves)
        _scale(axes, curves)
        _dress(axes, curves)
        figure.savefig(path)


def _draw(axes: Any, curves: Curves) -> None:
    axes.axhline(0.0, color="#888888", linewidth=0.8, zorder=1)
    for place, step in enumerate(curves.without_gradient):
        label = "" if place else "steps without gradient"
        axes.axvspan(step - 0.5, step + 0.5, color="#eeeeee", linewidth=0, zorder=0, label=label)
    counts = {True: 0, False: 0}
    for curve in curves.curves:
        helped = curve.total >= 0
        colours = PROPONENT_COLOURS if helped else OPPONENT_COLOURS
        colour = colours[counts[helped] % len(colours)]
        counts[helped] += 1
        label = f"{number(curve.total, signed=True)}   {shortened(curve.label, LABEL_LENGTH)}"
        steps = range(len(curve.influences))
        axes.plot(steps, curve.influences, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=label)
        band = [2 * error for error in curve.standard_errors]
        lower = [value - half for value, half in zip(curve.influences, band, strict=True)]
        upper = [value + half for value, half in zip(curve.influences, band, strict=True)]
        axes.fill_between(steps, lower, upper, color=colour, alpha=0.14, linewidth=0)


def _scale(axes: Any, curves: Curves) -> None:
    """Makes the scale logarithmic on both sides of a linear middle where the influences span a wide range."""
    axes.set_ylabel("influence (band: ±2 standard errors)")
    sizes = sorted(abs(value) for curve in curves.curves for value in curve.influences if value)
    if not sizes or sizes[-1] <= WIDE_RANGE * sizes[len(sizes) // 2]:
        return
    axes.set_yscale("symlog", linthresh=10.0 ** round(math.log10(sizes[len(sizes) // 2])))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("influence, logarithmic (band: ±2 standard errors)")


def _dress(axes: Any, curves: Curves) -> None:
    axes.set_title(curves.title, loc="left", fontweight="bold", fontsize=11)
    axes.set_xlabel(curves.axis)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.margins(x=0.02)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        title="total influence, training example",
        alignment="left",
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
    )
