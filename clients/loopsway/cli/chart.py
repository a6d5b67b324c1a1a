"""Trajectories drawn in the terminal. Knows plotext, and rich for the legend."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from .curves import Curves, number, shortened

WIDTH, HEIGHT = 96, 20
# Names that both plotext and rich know.
PROPONENT_COLOURS = ("blue", "cyan", "green")
OPPONENT_COLOURS = ("red", "magenta", "yellow")


def draw(curves: Curves, console: Console) -> None:
    """Prints the chart, and under it a legend with each example's total."""
    colours = _colours([curve.total for curve in curves.curves])
    console.print(Text(curves.title, style="bold"))
    chart = _chart(curves, colours, min(WIDTH, console.width))
    console.print(Text.from_ansi(chart), no_wrap=True, overflow="crop", highlight=False)
    for curve, colour in zip(curves.curves, colours, strict=True):
        line = Text("  ━━ ", style=colour)
        line.append(f"{number(curve.total, signed=True):>10}  ", style="default")
        line.append(shortened(curve.label, max(16, console.width - 20)), style="default")
        console.print(line, no_wrap=True, overflow="ellipsis", highlight=False)


def _colours(totals: Sequence[float]) -> list[str]:
    helped = iter(PROPONENT_COLOURS * len(totals))
    hurt = iter(OPPONENT_COLOURS * len(totals))
    return [next(helped) if total >= 0 else next(hurt) for total in totals]


def _chart(curves: Curves, colours: Sequence[str], width: int) -> str:
    # plotext ships no types; its one figure is a global, so it is cleared before and after.
    plotext: Any = importlib.import_module("plotext")
    figure: Any = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, HEIGHT)
    lowest, highest = _limits(curves)
    # plotext's own horizontal line paints a white background.
    count = max((len(curve.influences) for curve in curves.curves), default=1)
    ground = [(count - 1) * part / width for part in range(width + 1)]
    figure.draw(figure.signal(ground, [0.0] * len(ground), marker=plotext.marker("┈", "gray")))
    for curve, colour in reversed(list(zip(curves.curves, colours, strict=True))):  # the strongest on top
        steps = [float(step) for step in range(len(curve.influences))]
        signal = figure.signal(
            steps, [float(value) for value in curve.influences], marker=plotext.marker("braille", colour)
        )
        figure.draw(signal.lines())
    every = -(-count // 16)
    shown = list(range(0, count, every))
    figure.ruler("x").ticks([float(step) for step in shown], [str(step) for step in shown])
    ticks = sorted({lowest, lowest / 2, 0.0, highest / 2, highest})
    figure.ruler("y").ticks(ticks, [number(tick) for tick in ticks])
    figure.label(curves.axis, "x")
    text = str(figure.build().string()).rstrip("\n")
    figure.clear()
    return text


def _limits(curves: Curves) -> tuple[float, float]:
    values = [float(value) for curve in curves.curves for value in curve.influences]
    return min([0.0, *values]), max([0.0, *values])
