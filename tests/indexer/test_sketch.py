"""Sketches estimate inner products without bias, within the variance bound, and do not depend on how they are made.

With x and y all parameters' gradients and A, B a matrix parameter's part of them, the fused sketch has

    W Var<x, y> <= |x|^2 |y|^2 + <x, y>^2 + sum over matrices of (2 |A^T B|^2 + 2 |A B^T|^2)

(TensorSketch: Pham and Pagh 2013; the terms across parameters are CountSketch's, their hashes being independent).
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from looped import MODELS, InjectedModel, collate, losses, make_examples, make_model, step_gradients
from loopsway.indexer import Loop, SketchConfig, StepSketcher, accumulator
from loopsway.indexer.coding import decode, encode, rotate, variance_factor
from loopsway.indexer.config import LayerPath
from loopsway.indexer.gradients import Dense, Gradient, OuterProduct, TableRows
from loopsway.indexer.sketch import DeviceHash, ExactGradients, GradientSink, Sketches

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


def variance_bound(gradients: Tensor, shapes: list[tuple[int, ...]]) -> np.ndarray:
    """The bound above times 1 / W, for every pair of rows of [B * S, P]."""
    inner = gradients @ gradients.T
    squares = inner.diagonal()
    bound = squares[:, None] * squares + inner.square()
    for shape, part in zip(shapes, gradients.split([int(np.prod(s)) for s in shapes], dim=1), strict=True):
        if len(shape) == 2:
            matrices = part.unflatten(1, shape)  # [M, O, I]
            for pattern in ("aoi,boj->abij", "aoi,bpi->abop"):
                bound += 2 * torch.einsum(pattern, matrices, matrices).square().sum((2, 3))
    return (bound / WIDTH).numpy()


@pytest.fixture(scope="module", params=MODELS, ids=lambda kind: kind.__name__)
def trials(request: pytest.FixtureRequest) -> Trials:
    """Three examples of a model, without the steps that have no gradient."""
    model, examples = make_model(request.param), make_examples(3)
    exact = step_gradients(model, model.loop, examples).flatten(0, 1)
    live = exact.norm(dim=1) > 0
    shapes = list(StepSketcher(model, model.loop).parameters.values())
    sketched, coded = [], []
    for seed in range(TRIALS):
        config = SketchConfig(width=WIDTH, seed=seed)
        sketches = StepSketcher(model, model.loop, config).sketch(losses, collate(examples)).flatten(0, 1)[live]
        rows = rotate(sketches, seed)
        codes = encode(rows, 1)
        sketched.append((sketches.double() @ sketches.double().T).numpy())
        coded.append(decode(codes.codes, codes.factors, 1).astype(np.float64) @ rows.numpy().astype(np.float64).T)
    exact = exact[live]
    return Trials(np.stack(sketched), np.stack(coded), (exact @ exact.T).numpy(), variance_bound(exact, shapes))


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


CPU = torch.device("cpu")


def new_sketches(
    shapes: Any,
    batch: int,
    num_steps: int,
    *,
    width: int = 512,
    layer_path: LayerPath = "auto",
    scales: Any = None,
    row_bucketing: bool = False,
    seed: int = 0,
) -> Sketches:
    hashes = DeviceHash.of_parameters(
        shapes, width=width, seed=seed, checkpoint="single", device=CPU, row_bucketing=row_bucketing
    )
    return Sketches(hashes, batch, num_steps, width=width, layer_path=layer_path, device=CPU, scales=scales)


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


def test_tiles_do_not_change_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = torch.randn(3, 5, 20), torch.randn(3, 5, 70)
    whole, tiled = (new_sketches({"w": (20, 70)}, 3, 1, width=64) for _ in range(2))
    fourier = new_sketches({"w": (20, 70)}, 3, 1, width=64, layer_path="fourier")
    whole.add("w", 0, OuterProduct(left, right))
    monkeypatch.setattr("loopsway.indexer.sketch.TILE_BYTES", 4 * 3 * 70 * 3)
    tiled.add("w", 0, OuterProduct(left, right))
    fourier.add("w", 0, OuterProduct(left, right))
    torch.testing.assert_close(whole.values, tiled.values)
    torch.testing.assert_close(whole.values, fourier.values, rtol=1e-4, atol=1e-3)


def forms(rows: int, columns: int, batch: int = 2, tokens: int = 3) -> list[Gradient]:
    """One gradient in each form."""
    generator = torch.Generator().manual_seed(0)
    looked_up = torch.randint(0, rows, (batch, tokens), generator=generator)
    values = torch.randn(batch, tokens, columns, generator=generator)
    one_hot = torch.nn.functional.one_hot(looked_up, rows).float()
    dense = torch.einsum("btr,btc->brc", one_hot, values).flatten(1)
    return [Dense(dense), TableRows(looked_up, values), OuterProduct(one_hot, values)]


def sinks(shape: tuple[int, ...], scale: Tensor | None, layer_path: LayerPath = "auto") -> list[GradientSink]:
    scales = None if scale is None else {"w": scale}
    return [
        new_sketches({"other": (3,), "w": shape}, 2, 2, width=64, layer_path=layer_path, scales=scales),
        ExactGradients({"other": (3,), "w": shape}, 2, 2, device=CPU, scales=scales),
    ]


# More columns than the sketch has buckets, and fewer; rows that are grouped are in tests of their own.
@pytest.mark.parametrize("shape", [(4, 6), (5, 150), (1, 70)])
@pytest.mark.parametrize("scaled", [False, True])
def test_every_form_of_a_gradient_gives_the_same_sketch_and_the_same_exact_rows(
    shape: tuple[int, int], scaled: bool
) -> None:
    scale = 0.1 + torch.rand(shape) if scaled else None
    dense, *others = forms(*shape)
    assert isinstance(dense, Dense)
    scaled_by_hand = Dense(dense.values * (1 if scale is None else scale.flatten()))
    for position in range(2):
        expected = sinks(shape, None)[position]
        expected.add("w", 1, scaled_by_hand)
        assert expected.values[:, 0].count_nonzero() == 0
        for form in (dense, *others):
            sink = sinks(shape, scale)[position]
            sink.add("w", 1, form)
            torch.testing.assert_close(sink.values, expected.values)


@pytest.mark.parametrize(
    ("shape", "cuts"), [((6, 5), (0, 10, 15, 30)), ((30,), (0, 1, 17, 30)), ((200,), (0, 50, 70, 190, 200)),
                        ((3, 4, 20), (0, 33, 240)), ((4, 100), (0, 100, 400))],
)  # fmt: skip
@pytest.mark.parametrize("scaled", [False, True])
def test_a_gradient_may_come_in_pieces(shape: tuple[int, ...], cuts: tuple[int, ...], scaled: bool) -> None:
    """Whole rows of a matrix; any stretch of anything else, past the width too."""
    scale = 0.1 + torch.rand(shape) if scaled else None
    values = torch.randn(2, int(np.prod(shape)))
    for whole, pieces in zip(sinks(shape, scale), sinks(shape, scale), strict=True):
        whole.add("w", 1, Dense(values))
        for start, stop in pairwise(cuts):
            pieces.add("w", 1, Dense(values[:, start:stop], start))
        torch.testing.assert_close(whole.values, pieces.values)


def test_steps_may_come_in_any_order() -> None:
    gradients = {step: torch.randn(2, 24) for step in range(3)}
    ordered, mixed = (new_sketches({"w": (4, 6)}, 2, 3) for _ in range(2))
    for step, gradient in gradients.items():
        ordered.add("w", step, Dense(gradient))
    for step in (2, 0, 1, 2, 0, 1):
        mixed.add("w", step, Dense(gradients[step] / 2))
        assert mixed.values[:, step].count_nonzero() > 0
    torch.testing.assert_close(ordered.values, mixed.values)


def test_scaled_entries_are_refused_on_the_fourier_path_and_multiplied_out_where_it_would_be_cheaper() -> None:
    shape = (600, 600)
    scales = {"w": torch.rand(shape)}
    with pytest.raises(ValueError, match='optimizer_aware=True asks for; use layer_path="auto" or "product"'):
        new_sketches({"w": shape}, 1, 1, width=64, layer_path="fourier", scales=scales)
    gradient = OuterProduct(torch.randn(1, 1, 600), torch.randn(1, 1, 600))
    for scaled, path in ((None, "fourier"), (scales, "product")):
        sink = new_sketches({"w": shape}, 1, 1, width=64, scales=scaled)
        sink.add("w", 0, gradient)
        assert sink.costs["w"].path == path


@pytest.mark.parametrize("shape", [(40, 30), (5, 150)])
def test_without_overlapping_views_the_sketch_is_the_same(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    assert accumulator._overlapping_views_add_up(), "this release of torch is slow here; is it a tested one?"
    for form in forms(*shape):
        fast, slow = (new_sketches({"w": shape}, 2, 1, width=64) for _ in range(2))
        fast.add("w", 0, form)
        with monkeypatch.context() as patch:
            patch.setattr(accumulator, "_overlapping_views_add_up", lambda: False)
            slow.add("w", 0, form)
        torch.testing.assert_close(fast.values, slow.values)


def test_a_torch_that_loses_writes_through_overlapping_views_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def unfold(self: Tensor, dimension: int, size: int, step: int) -> Tensor:
        """Every write is lost."""
        return original(self, dimension, size, step).clone()

    original = Tensor.unfold
    monkeypatch.setattr(Tensor, "unfold", unfold)
    assert not accumulator._overlapping_views_add_up.__wrapped__()


def test_grouped_rows_give_one_sketch_by_every_path() -> None:
    """420 rows in 160 groups: blocks of 160, 160 and 100 rows, each summed in two pieces at most."""
    left, right = torch.randn(3, 5, 420), torch.randn(3, 5, 70)
    gradients = [
        (OuterProduct(left, right), "product", "product, 160 row groups"),
        (OuterProduct(left, right), "fourier", "fourier"),
        (Dense(torch.einsum("bto,bti->boi", left, right).flatten(1)), "auto", "dense"),
        (TableRows(torch.arange(420).expand(3, 420), torch.einsum("bto,bti->boi", left, right)), "auto", "rows"),
    ]
    values = []
    for gradient, layer_path, path in gradients:
        sink = new_sketches({"w": (420, 70)}, 3, 1, width=64, layer_path=layer_path, row_bucketing=True)
        sink.add("w", 0, gradient)
        assert sink.costs["w"].path == path
        values.append(sink.values)
    assert all(float((other - values[0]).norm() / values[0].norm()) < 1e-6 for other in values[1:])
    plain = new_sketches({"w": (420, 70)}, 3, 1, width=64)
    plain.add("w", 0, gradients[0][0])
    assert not torch.allclose(plain.values, values[0], rtol=0.5), "grouping is another hash"


def test_scaled_entries_of_grouped_rows_are_multiplied_out_apart() -> None:
    left, right, scale = torch.randn(3, 5, 420), torch.randn(3, 5, 30), 0.1 + torch.rand(420, 30)
    product, dense = (
        new_sketches({"w": (420, 30)}, 3, 1, width=64, row_bucketing=True, scales={"w": scale}) for _ in range(2)
    )
    product.add("w", 0, OuterProduct(left, right))
    dense.add("w", 0, Dense(torch.einsum("bto,bti->boi", left, right).flatten(1)))
    assert product.costs["w"].path == "product"
    assert float((product.values - dense.values).norm() / dense.values.norm()) < 1e-6


def flat_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of logits so small that no class is certain: a wide model with random weights has gradients still."""
    return functional.cross_entropy(model(batch["tokens"]) / 100, batch["labels"], reduction="none")


def test_grouping_rows_adds_a_tenth_to_the_error_at_most() -> None:
    """Real gradients; a width of 64 groups 800 of 1120 rows of the block's matrices, qkv and the MLP's first."""
    model, batch = make_model(InjectedModel, dim=160), collate(make_examples(6, longest=12))
    sketcher = StepSketcher(model, model.loop, SketchConfig(width=None))
    exact = sketcher.sketch(flat_losses, batch).flatten(0, 1)
    exact /= exact.norm(dim=1, keepdim=True)
    parts = dict(
        zip(sketcher.parameters, exact.split([int(np.prod(s)) for s in sketcher.parameters.values()], 1), strict=True)
    )
    inner = exact.double() @ exact.double().T
    errors = []
    for row_bucketing in (False, True):
        squares = torch.zeros_like(inner)
        for seed in range(TRIALS):
            sink = new_sketches(sketcher.parameters, len(exact), 1, width=64, seed=seed, row_bucketing=row_bucketing)
            for name, part in parts.items():
                sink.add(name, 0, Dense(part))
            sketches = sink.values[:, 0].double()
            squares += (sketches @ sketches.T - inner).square()
        errors.append(float((squares / TRIALS).mean().sqrt()))
    assert errors[1] < 1.1 * errors[0], f"grouping rows made the error {errors[1] / errors[0]:.2f} times as large"
    assert 0.5 < errors[0] * np.sqrt(64) < 2.5


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
