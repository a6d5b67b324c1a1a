"""What an evaluation leaves in its folder: results.json, results.parquet and a figure as PNG and SVG."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from ..findings import BLUE, GREY, ORANGE, dress
from .evaluation import BEYOND, DETECTION, REMOVAL, SCORE, SEED_MEAN, Amount, Result
from .predictions import is_step
from .subject import Subject

FILES = ("results.json", "results.parquet", "figure.png", "figure.svg")
AXES = {
    SCORE: "mean rank correlation, interval over seeds",
    SEED_MEAN: "mean rank correlation, interval over subsets",
    BEYOND: "mean partial rank correlation, interval over seeds",
    DETECTION: "area under the detection curve, interval over seeds",
    REMOVAL: "rise of the query's loss (nats), interval over seeds",
}


def write_report(subject: Subject, amount: Amount, results: Sequence[Result], folder: Path) -> None:
    """Writes FILES into the folder, which exists."""
    import matplotlib as mpl

    columns = [_columns(result) for result in results]
    pq.write_table(pa.Table.from_pylist(columns), folder / FILES[1])
    counts = {"subsets": amount.num_subsets, "seeds": list(amount.seeds), "removal_queries": amount.num_removal_queries}
    document = {"subject": subject.facts(), "amount": counts, "results": [_without_nan(each) for each in columns]}
    (folder / FILES[0]).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    figure = draw(subject, results)
    with mpl.rc_context({"svg.hashsalt": "loopsway"}):  # the same file each time
        figure.savefig(folder / FILES[2], dpi=130)
        figure.savefig(folder / FILES[3], metadata={"Date": None})


def draw(subject: Subject, results: Sequence[Result]) -> Figure:
    """A panel for each test: the methods, with their intervals; single steps are orange."""
    figure: Any = Figure(figsize=(16, 8), layout="constrained")
    figure.suptitle(f"{subject.name}: do influences predict retraining?", x=0.01, ha="left")
    panels = figure.subplots(2, 3)
    panels[1, 2].remove()
    for axes, (test, label) in zip(list(panels.flat)[: len(AXES)], AXES.items(), strict=True):
        mine = [result for result in results if result.test == test]
        for place, result in enumerate(mine):
            interval, colour = result.interval, ORANGE if is_step(result.method) else BLUE
            if not math.isnan(interval.low):
                axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=1.2)
            axes.plot(interval.mean, place, "o", color=colour, markersize=4)
        axes.axvline(0.5 if test == DETECTION else 0, color=GREY, linewidth=0.8)
        dress(axes, test, label, "")
        axes.set_yticks(range(len(mine)), [result.method for result in mine], fontsize=6)
        axes.invert_yaxis()
    return figure


def _columns(result: Result) -> dict[str, Any]:
    interval = result.interval
    return {
        "test": result.test,
        "method": result.method,
        "single_step": is_step(result.method),
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
        "values": list(result.values),
    }


def _without_nan(columns: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: None if isinstance(each, float) and math.isnan(each) else each for name, each in columns.items()}
