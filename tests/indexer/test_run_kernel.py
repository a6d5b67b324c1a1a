"""The GPU's kernel adds runs as torch does, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

# Triton reads the variable when it is imported, so the kernel runs in a process of its own. What it prints for each
# case is the largest difference from the torch path, as a share of the largest sum.
PROGRAM = """
import torch
from loopsway.indexer.sketches.accumulator import RunAccumulator
from loopsway.indexer.sketches.device_hash import RunStarts
from loopsway.indexer.sketches.run_kernel import add_runs

CASES = {  # runs, entries of a run, width
    "many runs": (130, 70, 256),
    "one run": (1, 300, 1024),
    "as long as the sketch": (5, 64, 64),
    "single entries": (40, 1, 64),
    "all start alike": (33, 20, 64),
    "none": (0, 20, 64),
}
for name, (count, length, width) in CASES.items():
    generator = torch.Generator().manual_seed(0)
    runs = torch.randn(3, count, length, generator=generator)
    where = torch.zeros(count) if name == "all start alike" else torch.rand(count, generator=generator)
    half = width + length
    starts = (where * width).long() + half * torch.randint(2, (count,), generator=generator)
    plain, by_kernel = (RunAccumulator(3, width, length, device=torch.device("cpu")) for _ in range(2))
    for part in (slice(None), slice(count // 3, count)):  # all, and some once more
        plain.add(RunStarts(starts).part(part), runs[:, part])
        add_runs(by_kernel._buffer, RunStarts(starts).part(part), runs[:, part])
    spread = runs.repeat_interleave(2, dim=2)[:, :, ::2]  # entries that are not side by side
    plain.add(RunStarts(starts), spread)
    add_runs(by_kernel._buffer, RunStarts(starts), spread)
    want, got = plain._buffer, by_kernel._buffer
    print(name, float((got - want).abs().max() / want.abs().max().clamp(min=1)), sep=": ")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; pip install triton==3.7.1")
def test_the_kernel_agrees_with_torch_to_rounding() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    differences = dict(line.split(": ") for line in done.stdout.splitlines())
    assert len(differences) == 6
    too_large = {name: difference for name, difference in differences.items() if not float(difference) < 1e-6}
    assert not too_large
