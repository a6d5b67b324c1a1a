"""Step gradients are exact on every looped model, and what can't be captured is an error that says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from looped import MODELS, InjectedModel, RangeModel, collate, losses, make_examples, make_model, step_gradients
from loopsway.indexer import Checkpoint, Loop, SketchConfig, StepSketcher

EXACT = SketchConfig(width=None)
EXAMPLES = make_examples(7)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("count", [1, 7])
def test_exact_step_gradients_equal_those_of_untied_copies(kind: Any, count: int) -> None:
    model = make_model(kind)
    got = StepSketcher(model, kind.loop, EXACT).sketch(losses, collate(EXAMPLES[:count]))
    want = step_gradients(model, kind.loop, EXAMPLES[:count])
    assert got.shape == want.shape
    assert float((got - want).norm() / want.norm()) <= 1e-5


def test_gradients_are_scaled_by_the_square_root_of_the_learning_rate() -> None:
    model, batch = make_model(InjectedModel), collate(EXAMPLES)
    plain = StepSketcher(model, model.loop, EXACT).sketch(losses, batch)
    scaled = StepSketcher(model, model.loop, EXACT, checkpoint=Checkpoint(name="a", learning_rate=0.25))
    torch.testing.assert_close(scaled.sketch(losses, batch), 0.5 * plain)


def test_steps_under_no_grad_count_and_are_reported() -> None:
    model = make_model(RangeModel, num_steps=5, truncated=2)
    captured = StepSketcher(model, model.loop, EXACT).run(losses, collate(EXAMPLES))
    assert captured.steps_without_gradient == (0, 1)
    assert captured.sink.values.shape[1] == 5
    assert not captured.sink.values[:, :2].any()
    assert captured.sink.values[:, 2:].abs().sum((0, 2)).all()


def test_detached_steps_are_reported_too() -> None:
    class Detached(InjectedModel):
        def forward(self, tokens: Tensor) -> Tensor:
            state = injected = self.embed(tokens)
            for step in range(self.num_steps):
                state = self.block(state + injected, tokens != 0)
                state = state.detach() if step == 1 else state
            return self.head(state.sum(1))

    model = make_model(Detached)
    captured = StepSketcher(model, model.loop, EXACT).run(losses, collate(EXAMPLES))
    assert captured.steps_without_gradient == (0, 1)


def test_padding_that_the_loss_masks_changes_nothing() -> None:
    model = make_model(InjectedModel)
    sketcher = StepSketcher(model, model.loop, EXACT)
    short, long = sorted(EXAMPLES, key=lambda example: len(example.tokens))[:: len(EXAMPLES) - 1]
    alone = sketcher.sketch(losses, collate([short]))
    padded = sketcher.sketch(losses, collate([short, long]))[:1]
    torch.testing.assert_close(alone, padded, rtol=1e-4, atol=1e-6)


def test_a_model_is_left_as_it_was() -> None:
    model = make_model(InjectedModel)
    model.head.bias.requires_grad_(False)
    before = [(p.clone(), p.requires_grad) for p in model.parameters()]
    StepSketcher(model, model.loop).sketch(losses, collate(EXAMPLES))
    for parameter, (value, trainable) in zip(model.parameters(), before, strict=True):
        assert parameter.requires_grad == trainable
        assert parameter.grad is None
        torch.testing.assert_close(parameter.data, value.data, rtol=0, atol=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_frozen_parameters_are_left_out() -> None:
    model = make_model(InjectedModel)
    model.block.mlp.requires_grad_(False)
    sketcher = StepSketcher(model, model.loop, EXACT)
    assert not [name for name in sketcher.parameters if "mlp" in name]
    assert "block.qkv.weight" in sketcher.parameters
    sketcher.sketch(losses, collate(EXAMPLES))


def test_a_queries_loop_may_be_longer_than_the_last() -> None:
    model = make_model(InjectedModel)
    sketcher = StepSketcher(model, model.loop, SketchConfig(width=256))
    assert sketcher.sketch(losses, collate(EXAMPLES)).shape == (7, 4, 256)
    model.num_steps = 9
    assert sketcher.sketch(losses, collate(EXAMPLES)).shape == (7, 9, 256)


def test_an_unsupported_module_is_named_with_its_type() -> None:
    model = make_model(InjectedModel)
    model.block.extra = nn.Conv1d(12, 12, 1)
    with pytest.raises(ValueError, match=r"'block.extra' is a Conv1d.*extra.weight.*supported are Linear"):
        StepSketcher(model, model.loop)


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_parent() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = make_model(InjectedModel)
    model.block.out = Scaled(12, 12)
    with pytest.raises(ValueError, match=r"'block.out' is a Scaled"):
        StepSketcher(model, model.loop)


@pytest.mark.parametrize(
    ("loop", "text"),
    [
        (Loop(body=["blok"]), "'blok' matches no module of the model; it has embed, block"),
        (Loop(body=["block"], marker="nowhere"), "marker 'nowhere' is no module"),
        (Loop(body=["block.mlp.1"]), "owns no parameter"),
    ],
)
def test_a_wrong_loop_is_refused(loop: Loop, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        StepSketcher(make_model(InjectedModel), loop)


def test_a_marker_that_runs_too_late_is_an_error() -> None:
    model = make_model(InjectedModel)
    sketcher = StepSketcher(model, Loop(body=["block"], marker="head"))
    with pytest.raises(ValueError, match="called before any step began"):
        sketcher.sketch(losses, collate(EXAMPLES))


class FunctionalUse(InjectedModel):
    """Uses a body weight behind its module's back, besides calling the module."""

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embed(tokens)
        for _ in range(self.num_steps):
            state = self.block(state, tokens != 0)
        return self.head(F.linear(state, self.block.out.weight).sum(1))


class MixedExamples(InjectedModel):
    """One example's loss depends on another's."""

    def forward(self, tokens: Tensor) -> Tensor:
        out = super().forward(tokens)
        return out + out.flip(0).tanh()


class TokensFirst(InjectedModel):
    """Has tokens in the first dimension, as many as examples."""

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embed(tokens).transpose(0, 1)
        for _ in range(self.num_steps):
            state = self.block(state, torch.ones(state.shape[:2], dtype=torch.bool))
        return self.head(state.transpose(0, 1).sum(1))


@pytest.mark.parametrize("kind", [FunctionalUse, MixedExamples, TokensFirst])
def test_what_hooks_cannot_see_is_found_by_the_check_against_autograd(kind: Any) -> None:
    model = make_model(kind)
    batch = collate(make_examples(6, longest=6))
    assert batch["tokens"].shape == (6, 6)
    with pytest.raises(ValueError, match="do not add up to its gradient by plain autograd"):
        StepSketcher(model, model.loop).sketch(losses, batch)


class SharedInput(InjectedModel):
    """Calls a body module with something that all examples share."""

    def forward(self, tokens: Tensor) -> Tensor:
        keep, shared = tokens != 0, self.embed(torch.arange(5)[None])
        state = self.embed(tokens)
        for _ in range(self.num_steps):
            state = self.block(state, keep) + self.block(shared, torch.ones(1, 5, dtype=torch.bool)).mean()
        return self.head((state * keep[:, :, None]).sum(1))


class Recomputed(InjectedModel):
    """Activation checkpointing."""

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embed(tokens)
        for _ in range(self.num_steps):
            state = checkpoint(self.block, state, tokens != 0, use_reentrant=False)
        return self.head(state.sum(1))


class NeverRun(InjectedModel):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).sum(1))


class Idle(InjectedModel):
    """Owns a body module that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.block.spare = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (SharedInput, r"shape \(1, 5, 24\), but the batch has 7"),
        (Recomputed, "activation checkpointing can't be attributed yet"),
        (NeverRun, "was never entered"),
        (Idle, "'block.spare' of the loop body was never called"),
    ],
)
def test_a_forward_that_cannot_be_attributed_says_why(kind: Any, text: str) -> None:
    model = make_model(kind)
    with pytest.raises(ValueError, match=text):
        StepSketcher(model, model.loop).sketch(losses, collate(EXAMPLES))


def test_an_input_changed_in_place_is_an_error() -> None:
    class InPlace(InjectedModel):
        def forward(self, tokens: Tensor) -> Tensor:
            state = self.embed(tokens)
            for _ in range(self.num_steps):
                state = state * 1
                after = self.block.mlp(state)
                state.add_(1)
                state = state + after
            return self.head(state.sum(1))

    model = make_model(InPlace)
    with pytest.raises(ValueError, match=r"module 'block\.mlp\.0' was changed in place"):
        StepSketcher(model, Loop(body=["block.mlp"])).sketch(losses, collate(EXAMPLES))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda values: values.mean(), r"gave \(\), expected one loss for each example"),
        (lambda values: values / torch.tensor([1.0, 0.0] + [1.0] * 5), r"examples \[1\] of the batch are not finite"),
        (lambda values: values.detach(), "depend on no step"),
    ],
)
def test_losses_that_break_the_contract_are_refused(change: Any, text: str) -> None:
    model = make_model(InjectedModel)
    with pytest.raises(ValueError, match=text):
        StepSketcher(model, model.loop).sketch(lambda m, b: change(losses(m, b)), collate(EXAMPLES))


def test_dropout_is_refused_outside_eval() -> None:
    model = make_model(InjectedModel)
    model.block.mlp[1] = nn.Dropout(0.1).eval()
    sketcher = StepSketcher(model, model.loop)
    sketcher.sketch(losses, collate(EXAMPLES))
    model.train()
    with pytest.raises(ValueError, match=r"'block.mlp.1' is Dropout in training mode"):
        sketcher.sketch(losses, collate(EXAMPLES))
