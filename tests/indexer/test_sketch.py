"""Sketches estimate inner products without bias, within the variance bound, and do not depend on how they are made.

With x and y all parameters' gradients the fused sketch has

    (W - 1) Var<x, y> <= |x|^2 |y|^2 + <x, y>^2

(as a CountSketch of all entries: Charikar, Chen and Farach-Colton 2002; see hashes.py for why matrices add nothing).
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from looped import MODELS, InjectedModel, collate, losses, make_examples, make_model, step_gradients
from loopsway.indexer import Loop, SketchConfig, StepSketcher
from loopsway.indexer.gradients.forms import Dense
from loopsway.indexer.sketches.coding import decode, encode, variance_factor
from loopsway.indexer.sketches.rotation import rotate
from loopsway.indexer.sketches.sketch import DeviceHash, Sketches

TRIALS = 200
WIDTH = 256


@dataclass(frozen=True)
class Trials:
    """Estimates of all inner products of (example, step) gradients, one matrix [M, M] for each seed.

    Attributes:
        sketched: [TRIALS, M, M], of float32 sketches.
        coded: the same with one side coded to 1 bit.
        exact: [M, M], by untied copies in float64.
        bound: [M, M], of the variance of `sketched`.
    """

    sketched: np.ndarray
    coded: np.ndarray
    exact: np.ndarray
    bound: np.ndarray


def variance_bound(gradients: Tensor) -> np.ndarray:
    """The bound above, for every pair of rows of [B * S, P]."""
    inner = gradients @ gradients.T
    squares = inner.diagonal()
    return ((squares[:, None] * squares + inner.square()) / (WIDTH - 1)).numpy()


@pytest.fixture(scope="module", params=MODELS, ids=lambda kind: kind.__name__)
def trials(request: pytest.FixtureRequest) -> Trials:
    """Three examples of a model, without the steps that have no gradient."""
    model, examples = make_model(request.param), make_examples(3)
    exact = step_gradients(model, model.loop, examples).flatten(0, 1)
    live = exact.norm(dim=1) > 0
    sketched, coded = [], []
    for seed in range(TRIALS):
        config = SketchConfig(width=WIDTH, seed=seed)
        sketches = StepSketcher(model, model.loop, config).sketch(losses, collate(examples)).flatten(0, 1)[live]
        rows = rotate(sketches, seed)
        codes = encode(rows, 1)
        sketched.append((sketches.double() @ sketches.double().T).numpy())
        coded.append(decode(codes.codes, codes.factors, 1).astype(np.float64) @ rows.numpy().astype(np.float64).T)
    exact = exact[live]
    return Trials(np.stack(sketched), np.stack(coded), (exact @ exact.T).numpy(), variance_bound(exact))


@pytest.mark.parametrize("what", ["sketched", "coded"])
def test_inner_products_are_unbiased(trials: Trials, what: str) -> None:
    estimates = getattr(trials, what)
    z = (estimates.mean(0) - trials.exact) / (estimates.std(0, ddof=1) / np.sqrt(TRIALS))
    assert np.abs(z).max() < 5, f"an entry's mean is {np.abs(z).max():.1f} standard errors off: signs are not random"
    assert np.sqrt(np.mean(z**2)) < 2, f"rms z is {np.sqrt(np.mean(z**2)):.2f}, expected about 1: a biased estimate"


def test_variance_stays_within_the_bound(trials: Trials) -> None:
    variance = trials.sketched.var(0, ddof=1)
    fourth = np.mean((trials.sketched - trials.sketched.mean(0)) ** 4, axis=0)
    noise = np.sqrt((fourth - variance**2) / TRIALS)  # standard error of the variance itself
    excess = (variance - trials.bound) / noise
    assert excess.max() < 4, (
        f"variance is {excess.max():.1f} standard errors above its bound: buckets collide too often"
    )
    assert np.mean(variance / trials.bound) < 1, f"mean ratio to the bound is {np.mean(variance / trials.bound):.2f}"
    assert np.mean(variance / trials.bound) > 0.2, "far below the bound: the estimate does not vary with the seed"


def test_one_bit_adds_no_more_noise_than_stated(trials: Trials) -> None:
    errors = [np.mean((estimates - trials.exact) ** 2) for estimates in (trials.sketched, trials.coded)]
    ratio = errors[1] / errors[0]
    assert ratio < 1.1 * variance_factor(1), f"1 bit has {ratio:.2f} times the sketch's variance, stated is pi / 2"
    assert ratio > 1, "coding to 1 bit can't be better than not coding"


@pytest.mark.parametrize("kind", MODELS)
def test_the_two_paths_agree(kind: Any) -> None:
    model, batch = make_model(kind), collate(make_examples(5))
    product, fourier = (
        StepSketcher(model, kind.loop, SketchConfig(width=512, layer_path=path)).sketch(losses, batch)
        for path in ("product", "fourier")
    )
    assert float((product - fourier).norm() / product.norm()) <= 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_sketching_is_linear(kind: Any) -> None:
    """The sketch of exact step gradients by the dense path equals the sketch made during the backward pass."""
    model, batch = make_model(kind), collate(make_examples(5))
    sketcher = StepSketcher(model, kind.loop, SketchConfig(width=512))
    got = sketcher.sketch(losses, batch)
    exact = StepSketcher(model, kind.loop, SketchConfig(width=None)).sketch(losses, batch)
    shapes = sketcher.parameters
    parts = dict(zip(shapes, exact.split([int(np.prod(s)) for s in shapes.values()], dim=2), strict=True))
    sink = new_sketches(shapes, len(exact), exact.shape[1])
    for name, part in parts.items():
        for step in range(exact.shape[1]):
            sink.add(name, step, Dense(part[:, step]))
    assert float((got - sink.values).norm() / got.norm()) <= 1e-5
    mixed = new_sketches(shapes, 1, 1)
    for name, part in parts.items():
        mixed.add(name, 0, Dense((2 * part[0] - 3 * part[1]).sum(0)[None]))
    assert float((mixed.values[0, 0] - (2 * got[0] - 3 * got[1]).sum(0)).norm() / got.norm()) <= 1e-5


@pytest.mark.parametrize("kind", MODELS)
def test_steps_sum_to_the_sketch_of_the_whole_gradient(kind: Any) -> None:
    model, examples = make_model(kind), make_examples(5)
    sketcher = StepSketcher(model, kind.loop, SketchConfig(width=512))
    total = step_gradients(model, kind.loop, examples).sum(1).float()
    sink, shapes = new_sketches(sketcher.parameters, 5, 1), sketcher.parameters
    for name, part in zip(shapes, total.split([int(np.prod(s)) for s in shapes.values()], dim=1), strict=True):
        sink.add(name, 0, Dense(part))
    got = sketcher.sketch(losses, collate(examples)).sum(1)
    assert float((got - sink.values[:, 0]).norm() / got.norm()) <= 1e-5


def new_sketches(shapes: Any, batch: int, num_steps: int) -> Sketches:
    device = torch.device("cpu")
    hashes = DeviceHash.of_parameters(shapes, width=512, seed=0, checkpoint="single", device=device)
    return Sketches(hashes, batch, num_steps, width=512, layer_path="auto", device=device)


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_split_changes_rounding_at_most(kind: Any) -> None:
    model, examples = make_model(kind), make_examples(6)
    sketcher = StepSketcher(model, kind.loop, SketchConfig(width=512))
    whole = sketcher.sketch(losses, collate(examples))
    again = sketcher.sketch(losses, collate(examples))
    split = torch.cat([sketcher.sketch(losses, collate(examples[part])) for part in (slice(2), slice(2, 6))])
    assert torch.equal(whole, again)
    assert float((whole - split).norm() / whole.norm()) <= 1e-5


def test_another_process_makes_the_same_bits(tmp_path: Path) -> None:
    program = (
        "import sys, torch\n"
        "from looped import *\n"
        "from loopsway.indexer import SketchConfig, StepSketcher\n"
        "model = make_model(InjectedModel)\n"
        "sketcher = StepSketcher(model, model.loop, SketchConfig(width=512, seed=3))\n"
        "torch.save(sketcher.sketch(losses, collate(make_examples(6))), sys.argv[1])\n"
    )
    file = tmp_path / "sketches.pt"
    subprocess.run([sys.executable, "-c", program, str(file)], check=True, cwd=Path(__file__).parents[1])
    model = make_model(InjectedModel)
    here = StepSketcher(model, model.loop, SketchConfig(width=512, seed=3)).sketch(losses, collate(make_examples(6)))
    assert torch.equal(here, torch.load(file, weights_only=True))


def test_checkpoints_are_hashed_apart() -> None:
    """Equal weights at two checkpoints must not have equal sketches, or their cross terms would be counted."""
    from loopsway.indexer import Checkpoint

    model, batch = make_model(InjectedModel), collate(make_examples(4))
    first, second = (
        StepSketcher(model, Loop(body=["block"]), checkpoint=Checkpoint(name=name, learning_rate=1)).sketch(
            losses, batch
        )
        for name in ("a", "b")
    )
    cosines = torch.nn.functional.cosine_similarity(first, second, dim=2)
    assert cosines.abs().max() < 0.1
