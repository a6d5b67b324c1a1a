"""Optimizer-aware influence: every gradient entry is scaled by (sqrt(v) + eps)^(-1/2), v Adam's second moment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layers import Looped
from looped import MODELS, InjectedModel, collate, losses, make_examples, make_model
from loopsway.indexer import Checkpoint, SketchConfig, StepSketcher
from untied import sketch_of, untied_gradients

EXACT = SketchConfig(width=None, optimizer_aware=True)
EPSILON = EXACT.optimizer_epsilon
BATCH = collate(make_examples(5))
# One of each form that a gradient may have: outer product, one expert's, rows of a table, transposed, dense.
CELLS = ("Linear", "x @ w", "experts in a loop", "Embedding", "Conv1d, depthwise", "a scalar gate", "weight_norm")


def adam_moments(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """As training leaves them: over many orders of magnitude, and zero where there never was a gradient."""
    generator = torch.Generator().manual_seed(seed)
    moments = {}
    for name, parameter in model.named_parameters():
        moments[name] = (4 * torch.randn(parameter.shape, generator=generator) - 8).exp()
        moments[name].flatten()[:1] = 1e-12
    return moments


def preconditioned(model: nn.Module, loop: Any, moments: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The oracle's gradients [B, S, P] and sqrt(v) + eps [P]."""
    gradients, names = untied_gradients(model, loop, losses, BATCH)
    return gradients, torch.cat([moments[name].double().sqrt().flatten() for name in names]) + EPSILON


def model_of(name: str) -> tuple[nn.Module, Any]:
    kind = next((kind for kind in MODELS if kind.__name__ == name), None)
    return (make_model(Looped, name=name), Looped.loop) if kind is None else (make_model(kind), kind.loop)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("name", [*(kind.__name__ for kind in MODELS), *CELLS])
def test_exact_gradients_are_the_oracles_scaled_elementwise(name: str, outside: bool) -> None:
    model, loop = model_of(name)
    loop, moments = replace(loop, outside=outside), adam_moments(model)
    gradients, scale = preconditioned(model, loop, moments)
    got = StepSketcher(model, loop, EXACT, second_moments=moments).sketch(losses, BATCH)
    want = gradients / scale.sqrt()
    assert float((got - want).norm() / want.norm()) <= 1e-5
    assert float((got * scale.sqrt() - gradients).norm() / gradients.norm()) <= 1e-5  # large and small scales count


@pytest.mark.parametrize("kind", MODELS)
def test_inner_products_are_those_with_adams_preconditioner(kind: Any) -> None:
    model = make_model(kind)
    moments = adam_moments(model)
    gradients, scale = preconditioned(model, kind.loop, moments)
    sketched = StepSketcher(model, kind.loop, EXACT, second_moments=moments).sketch(losses, BATCH).double()
    train, query = gradients.flatten(0, 1), (gradients / scale).flatten(0, 1)
    got, want = sketched.flatten(0, 1) @ sketched.flatten(0, 1).T, train @ query.T
    assert float((got - want).norm() / want.norm()) <= 1e-5


@pytest.mark.parametrize("name", [*(kind.__name__ for kind in MODELS), *CELLS])
def test_a_sketch_is_that_of_the_scaled_gradients(name: str) -> None:
    model, loop = model_of(name)
    moments = adam_moments(model)
    gradients, scale = preconditioned(model, loop, moments)
    config = SketchConfig(width=512, optimizer_aware=True)
    sketcher = StepSketcher(model, loop, config, second_moments=moments)
    want = sketch_of(gradients / scale.sqrt(), sketcher.parameters, config)
    assert float((sketcher.sketch(losses, BATCH) - want).norm() / want.norm()) <= 1e-5


def test_the_learning_rate_scales_them_too() -> None:
    model = make_model(InjectedModel)
    moments = adam_moments(model)
    plain, quarter = (
        StepSketcher(
            model, model.loop, EXACT, checkpoint=Checkpoint(name="a", learning_rate=rate), second_moments=moments
        ).sketch(losses, BATCH)
        for rate in (1.0, 0.25)
    )
    torch.testing.assert_close(quarter, 0.5 * plain)


def test_another_epsilon_is_another_scale() -> None:
    model = make_model(InjectedModel)
    moments = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    plain = StepSketcher(model, model.loop, SketchConfig(width=None)).sketch(losses, BATCH)
    config = replace(EXACT, optimizer_epsilon=0.01)
    scaled = StepSketcher(model, model.loop, config, second_moments=moments).sketch(losses, BATCH)
    torch.testing.assert_close(scaled, 10 * plain)


@pytest.mark.parametrize("change", ["none", "missing", "shape", "negative"])
def test_moments_that_do_not_fit_the_model_are_refused(change: str) -> None:
    model = make_model(InjectedModel)
    moments: dict[str, Tensor] | None = adam_moments(model)
    if change == "none":
        moments = None
    elif change == "missing":
        del moments["block.qkv.weight"]
    else:
        value = moments["block.qkv.weight"]
        moments["block.qkv.weight"] = value[:-1] if change == "shape" else -value
    with pytest.raises(ValueError, match=r"second.moment"):
        StepSketcher(model, model.loop, EXACT, second_moments=moments)
