"""Each benchmark program runs, and its tables have the rows that RESULTS.md is made of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
ROWS = {
    "bench_reference.py": ["| reference, m=16 | 32 |", *(f"| ours, W=256 | {bits} |" for bits in (32, 8, 1))],
    "bench_build.py": ["| looped GPT d=32, T=16, 2 steps, batch 4 | 8192 |"],
    "bench_planner.py": ["| MULTIPLY_ADD_NS |", "| SCATTER_NS |", "| FFT_NS |", "| 4 x 16 x 8 | 256 |"],
}


@pytest.mark.parametrize("program", ROWS)
def test_a_smoke_run_prints_every_row_of_its_table(program: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LOOPSWAY_GSM8K"}
    run = subprocess.run(
        [sys.executable, FOLDER / program, "--smoke"], capture_output=True, text=True, timeout=120, env=environment
    )
    assert run.returncode == 0, run.stderr
    missing = [row for row in ROWS[program] if row not in run.stdout]
    assert not missing, f"{missing} are not in\n{run.stdout}"
    if program == "bench_reference.py":
        assert "GSM8K is skipped: LOOPSWAY_GSM8K" in run.stdout
