"""What an experiment leaves in its folder: data as Parquet, a figure as PNG and SVG, and the claims that it checked.

The paper is Kaissis et al. 2026, arXiv 2602.10097. Where only its abstract and its package are known here, a claim says
so, and `agrees` is None.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from loopsway.indexer import Index

UNCHECKED = "not checked against the paper's text"
# Told apart by people who can't tell red from green (Okabe and Ito 2008).
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#777777"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One thing that was checked.

    Attributes:
        claim: what.
        paper: what the paper reports, or UNCHECKED.
        seen: what this run found.
        agrees: whether it does; None where that can't be said.
    """

    claim: str
    paper: str
    seen: str
    agrees: bool | None


@dataclass(frozen=True, kw_only=True)
class Findings:
    """Of one run.

    Attributes:
        setting: what it ran with, for the record.
        data: what the figure shows.
        figure: drawn.
        claims: checked.
    """

    setting: Any
    data: pa.Table
    figure: Figure
    claims: Sequence[Claim]

    def write(self, folder: Path) -> None:
        """Writes data.parquet, figure.png, figure.svg and claims.json."""
        import matplotlib as mpl

        folder.mkdir(parents=True, exist_ok=True)
        pq.write_table(self.data, folder / "data.parquet")
        with mpl.rc_context({"svg.hashsalt": "loopsway"}):  # the same file each time
            self.figure.savefig(folder / "figure.png", dpi=150)
            self.figure.savefig(folder / "figure.svg", metadata={"Date": None})
        record = {"setting": asdict(self.setting), "claims": [asdict(claim) for claim in self.claims]}
        (folder / "claims.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def dress(axes: Any, title: str, x: str, y: str) -> None:
    """Gives a panel its title, labels with units, and a light grid."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def difference_from_tracin(index: Index, sketches: np.ndarray) -> float:
    """Of a query's trajectories, summed over its loops: relative, the largest of its ten strongest proponents.

    Args:
        index: that is asked.
        sketches: of the query, [S, W].
    """
    ranked = index.search(sketches, k=10).total.proponents
    rows = index.trajectories(sketches, ranked.example_ids)[0]  # [10, S]
    return float(np.abs(rows.sum(1) - ranked.influences).max() / np.abs(ranked.influences).max())


def adds_up(difference: float) -> Claim:
    """The claim that a `difference_from_tracin` is none."""
    return Claim(
        claim="the SDI trajectory adds up to TracIn",
        paper="so by definition: SDI decomposes TracIn into a trajectory over loop iterations (abstract)",
        seen=f"largest relative difference over the ten strongest proponents: {difference:.1e}",
        agrees=difference < 1e-4,
    )
