"""Whatever a model does with a parameter, its step gradients are those of untied copies."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from layers import CELLS, SINGLE_ONLY, Looped
from looped import MODELS, collate, losses, make_examples, make_model, step_gradients
from loopsway.indexer import SketchConfig, StepSketcher
from untied import sketch_of, untied_gradients

EXACT = SketchConfig(width=None)
TOLERANCE = 1e-5  # of float32 against float64
TRIALS, WIDTH = 16, 512
# As many examples as tokens (6), experts (3) and features (8): no dimension may be mistaken for another. A sketcher
# that has seen one example first, or many, must be right on the others.
BATCHES = {"many first": (6, 1, 3), "one first": (1, 8)}


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got - want).norm() / want.norm())


@cache
def expected(name: str, count: int) -> tuple[Tensor, list[str]]:
    """By the oracle, on a model of its own."""
    dtype = torch.float32 if name in SINGLE_ONLY else torch.float64
    return untied_gradients(make_model(Looped, name=name), Looped.loop, losses, batch_of(count), dtype=dtype)


def batch_of(count: int) -> dict[str, Tensor]:
    return collate(make_examples(count, seed=count))


@pytest.mark.parametrize("kind", MODELS)
def test_the_general_oracle_equals_the_one_of_copied_modules(kind: type) -> None:
    model, examples = make_model(kind), make_examples(5)
    got, names = untied_gradients(model, kind.loop, losses, collate(examples))
    assert relative_error(got, step_gradients(model, kind.loop, examples)) < 1e-12
    assert names == list(StepSketcher(model, kind.loop).parameters)


@pytest.mark.parametrize("name", CELLS)
def test_the_oracles_steps_sum_to_the_gradient_of_plain_autograd(name: str) -> None:
    model = make_model(Looped, name=name)
    got, names = expected(name, 1)
    parameters = [parameter for key, parameter in model.named_parameters() if key in names]
    want = torch.autograd.grad(losses(model, batch_of(1)).sum(), parameters)
    assert relative_error(got.sum((0, 1)), torch.cat([part.flatten() for part in want])) <= TOLERANCE


@pytest.mark.parametrize("counts", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", CELLS)
def test_exact_step_gradients_equal_those_of_untied_parameters(name: str, counts: tuple[int, ...]) -> None:
    sketcher = StepSketcher(make_model(Looped, name=name), Looped.loop, EXACT)
    for count in counts:
        want, names = expected(name, count)
        assert list(sketcher.parameters) == names
        error = relative_error(sketcher.sketch(losses, batch_of(count)), want)
        assert error <= TOLERANCE, f"relative error {error:.2g} on {count} examples"


@pytest.mark.parametrize("trial", range(4))
@pytest.mark.parametrize("name", [name for name in CELLS if "experts" in name or "packed" in name])
def test_rows_that_came_in_order_once_may_come_in_any_order_later(name: str, trial: int) -> None:
    model = make_model(Looped, name=name, num_steps=1)
    sketcher = StepSketcher(model, Looped.loop, EXACT)
    pool = make_examples(200, seed=trial)
    of_length = {n: iter([example for example in pool if len(example.tokens) == n]) for n in (2, 3, 4)}
    for a, b in ((2, 2), (2, 2), (2, 4), (3, 3), (4, 2), (2, 3)):
        batch = collate([next(examples) for examples in (of_length[a], of_length[b])])
        want = untied_gradients(model, Looped.loop, losses, batch, dtype=torch.float32)[0]
        error = relative_error(sketcher.sketch(losses, batch), want)
        assert error <= TOLERANCE, f"tokens {a, b}: relative error {error:.2g}"


@pytest.mark.parametrize("name", CELLS)
def test_a_sketch_is_that_of_the_oracles_gradients(name: str) -> None:
    """So its inner products are unbiased and within the bound, for each kind of use, as they are in test_sketch.py."""
    config = SketchConfig(width=WIDTH)
    sketcher = StepSketcher(make_model(Looped, name=name), Looped.loop, config)
    want = sketch_of(expected(name, 3)[0], sketcher.parameters, config)
    assert relative_error(sketcher.sketch(losses, batch_of(3)), want) <= TOLERANCE


@pytest.mark.parametrize("name", ["Linear", "experts in a loop", "Embedding tied to a readout", "weight_norm", "GRU"])
def test_sketched_inner_products_stay_within_the_variance_bound(name: str) -> None:
    """(W - 1) Var<x, y> <= |x|^2 |y|^2 + <x, y>^2: test_sketch.py's bound."""
    model, batch = make_model(Looped, name=name), batch_of(3)
    exact = expected(name, 3)[0].flatten(0, 1)
    inner = exact @ exact.T
    bound = (torch.outer(inner.diagonal(), inner.diagonal()) + inner.square()) / (WIDTH - 1)
    sketches = [
        StepSketcher(model, model.loop, SketchConfig(width=WIDTH, seed=seed)).sketch(losses, batch).flatten(0, 1)
        for seed in range(TRIALS)
    ]
    z2 = torch.stack([(s.double() @ s.double().T - inner).square() / bound for s in sketches])
    assert z2.mean() < 1.5, f"squared errors are {z2.mean():.2f} of the bound: a term is missing or counted twice"
    assert z2.mean() > 0.05, f"squared errors are {z2.mean():.2g} of the bound: the sketch does not vary with the seed"
