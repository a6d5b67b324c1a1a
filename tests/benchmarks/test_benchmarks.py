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
    "bench_sketch.py": [
        "| (a) looped GPT, d=32, T=16, 2 steps, batch 4 |",
        "| (b) looped GPT, d=32, T=16, 2 steps, batch 4 |",
        "| (c) 2 / 4 / 2 blocks, d=32, T=16, 2 steps, batch 4 |",
        "| (d) ALBERT's shape, d=32, T=16, 2 steps, batch 4 |",
        "| (e) GPT-2 of 4 layers, d=32, T=16, 1 step, batch 4 |",
        "| (b) looped GPT, d=32, T=16, 2 steps, batch 1 |",
        *(f"| ours, W=512 | {bits} | 512 |" for bits in (1, 2, 4, 8, 16, 32)),
        *("| reference, m=22 | 32 | 264 | 1,056 |", "| reference, m=22 | 32 | 1,056 | 4,224 |"),
        *("| reference, m=22 | 264 |", "| 32 | 256 | 1 |"),
        *("| B | 4 |", "| steps | 2 |", "| T | 16 |", "| 1024 |", "| 512 | "),
    ],
    "bench_store.py": ["| 300 |", "| (b) looped GPT, d=32, T=16, 2 steps, batch 4 | 16 |"],
    "bench_search.py": [
        "| 300 x 1,024, 1 bits | ours |",
        *("| 300 x 512, 16 bits | ours |", "| 300 x 128, 8 bits | ours |", "| FAISS SQfp16 |"),
        *("| FAISS HNSW32, efSearch 128 |", "| FAISS IVF64, nprobe 16 |"),
    ],
    "bench_curation.py": [
        *(f"| 300 x 256, 1 bit | {job}" for job in ("mean of 20 queries", "each of 20 queries, top 0.1%")),
        *(f"| 300 x 256, 1 bit | {job}" for job in ("energies of 20", "neighbors of 64", "all near-duplicates")),
    ],
    "bench_recall.py": [
        *(
            f"| {rows}, {bits} bits | {factory} |"
            for bits in (1, 16)
            for rows in ("looped GPT d=32, T=16, 2 steps, 300 examples, W=256", "Gaussian, 300 x 256")
            for factory in (
                "scan of every code",
                "default",
                "SQ8",
                "SQfp16",
                "IVF16,SQ8",
                "HNSW32,SQ8",
                "IVF1,PQ32x4fs",
            )
        ),
        "| looped GPT d=32, T=16, 2 steps, 300 examples, W=256, 1 bits | IVF16,PQ32x4fs,Refine(SQ8) |",
    ],
    "bench_device.py": [
        "| 2 x 8 tokens, 16 x 8 | TF32 |",
        "| (a) looped GPT, d=32, T=16, 2 steps, batch 4 | bfloat16 |",
        "| 300 x 64, 1 bits |",
    ],
    "bench_service.py": [
        *(f"| {query}, the {who} |" for query in ("a sketch", "an example") for who in ("engine", "service")),
        *(f"| engine, batches of {size} |" for size in (1, 16, 32)),
        *(f"| service, {callers} callers |" for callers in (1, 4, 16)),
        *(f"| {share} x |" for share in ("0.5", "1", "2")),
    ],
    "bench_planner.py": ["| MULTIPLY_ADD_NS |", "| SCATTER_NS |", "| FFT_NS |", "| 4 x 16 x 8 | 256 |"],
}


@pytest.mark.parametrize("program", ROWS)
def test_a_smoke_run_prints_every_row_of_its_table(program: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LOOPSWAY_GSM8K"}
    run = subprocess.run(
        [sys.executable, FOLDER / program, "--smoke"], capture_output=True, text=True, timeout=240, env=environment
    )
    assert run.returncode == 0, run.stderr
    missing = [row for row in ROWS[program] if row not in run.stdout]
    assert not missing, f"{missing} are not in\n{run.stdout}"
    if program in ("bench_recall.py", "bench_reference.py", "bench_sketch.py"):
        assert "GSM8K is skipped: LOOPSWAY_GSM8K" in run.stdout


def test_the_curve_of_widths_is_drawn_as_png_and_svg(tmp_path: Path) -> None:
    options = ["--smoke", "--part", "widths", "--figure", tmp_path / "new/curve"]
    run = subprocess.run(
        [sys.executable, FOLDER / "bench_sketch.py", *options], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "new/curve.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "new/curve.svg").read_bytes()
