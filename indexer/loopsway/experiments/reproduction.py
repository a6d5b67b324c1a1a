"""The experiments by name, and how one is run into a folder."""

from __future__ import annotations

import importlib
from pathlib import Path

from .findings import Findings

EXPERIMENTS = {"fig1": "parity", "fig2": "sudoku", "fig3": "horizons", "fig4": "widths", "scale": "scale"}


def reproduce(
    name: str, folder: str | Path, *, size: str = "small", device: str = "cpu", progress: bool = True
) -> Findings:
    """Runs an experiment and writes its data, figure and claims.

    Args:
        name: of EXPERIMENTS.
        folder: takes the findings, and what the experiment trains and builds, which is used again.
        size: "tiny", for tests; "small", minutes on a CPU; "full", for a GPU.
        device: a torch device name.
        progress: whether to show it in the terminal.

    Raises:
        ValueError: there is no such experiment.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"there is no experiment {name!r}; name one of {', '.join(EXPERIMENTS)}")
    folder = Path(folder)
    module = importlib.import_module(f".{EXPERIMENTS[name]}", __package__)
    findings: Findings = module.run(size, folder / "work" / size, device, progress)
    findings.write(folder)
    return findings
