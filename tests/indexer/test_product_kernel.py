"""The GPU's product kernel gives the sketch that torch gives, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

# Triton reads the variable when it is imported, so the kernel runs in a process of its own. What it prints for each
# case is the relative difference from the torch path.
PROGRAM = """
import torch
from loopsway.indexer.gradients.forms import OuterProduct
from loopsway.indexer.sketches.product_kernel import add_product
from loopsway.indexer.sketches.sketch import DeviceHash, Sketches

CPU = torch.device("cpu")
CASES = {  # rows, columns, tokens, width, scaled
    "one tile": (64, 64, 32, 256, False),
    "ragged tiles": (130, 70, 45, 256, False),
    "one token": (20, 30, 1, 64, False),
    "more columns than buckets": (20, 150, 5, 64, False),
    "scaled": (70, 65, 5, 64, True),
}
for name, (rows, columns, tokens, width, scaled) in CASES.items():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(2, tokens, size, generator=generator) for size in (rows, columns))
    hashes = DeviceHash.of_parameters({"w": (rows, columns)}, width=width, seed=0, checkpoint="a", device=CPU)
    scales = {"w": 0.1 + torch.rand(rows, columns, generator=generator)} if scaled else {}
    sketches = Sketches(hashes, 2, 3, width=width, layer_path="product", device=CPU, scales=scales)
    sketches.add("w", 1, OuterProduct(left, right))
    got = torch.ones(2, 3, width)
    add_product(got[:, 1], left, right, hashes["w"], scales.get("w"))
    assert torch.equal(got[:, ::2], torch.ones(2, 2, width)), "other steps were written to"
    want = sketches.values[:, 1]
    print(name, float((got[:, 1] - 1 - want).norm() / want.norm()), sep=": ")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; pip install triton==3.9.0")
def test_the_kernel_agrees_with_torch_to_rounding() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    differences = dict(line.split(": ") for line in done.stdout.splitlines())
    assert len(differences) == 5
    too_large = {name: difference for name, difference in differences.items() if not float(difference) < 1e-6}
    assert not too_large
