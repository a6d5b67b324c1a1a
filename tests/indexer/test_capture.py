"""Step gradients are exact on every looped model, and what can't be captured is an error that says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layers import Scale
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
    assert captured.values.shape[1] == 5
    assert not captured.values[:, :2].any()
    assert captured.values[:, 2:].abs().sum((0, 2)).all()


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
    with pytest.raises(ValueError, match="used before any step began: the loop's marker is head"):
        sketcher.sketch(losses, collate(EXAMPLES))


class MixedExamples(InjectedModel):
    """One example's loss depends on another's."""

    def forward(self, tokens: Tensor) -> Tensor:
        out = super().forward(tokens)
        return out + out.flip(0).tanh()


class NormalizedOverTheBatch(InjectedModel):
    """Batch statistics in the body."""

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embed(tokens)
        for _ in range(self.num_steps):
            state = self.block(state, tokens != 0)
            state = state - state.mean((0, 1))
        return self.head(state.sum(1))


@pytest.mark.parametrize("kind", [MixedExamples, NormalizedOverTheBatch])
def test_losses_that_mix_examples_are_refused(kind: Any) -> None:
    model = make_model(kind)
    with pytest.raises(ValueError, match=r"one example's loss depends on another's: the gradient at .* with block"):
        StepSketcher(model, model.loop).sketch(losses, collate(EXAMPLES))


class TokensFirst(InjectedModel):
    """Has tokens in the first dimension, as many as examples."""

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embed(tokens).transpose(0, 1)
        for _ in range(self.num_steps):
            state = self.block.mlp(self.block.norm1(state))
        return self.head(state.transpose(0, 1).sum(1))


def test_the_batch_need_not_be_the_first_dimension() -> None:
    model, examples = make_model(TokensFirst), make_examples(6, longest=6)
    batch = collate(examples)
    assert batch["tokens"].shape == (6, 6)
    loop = Loop(body=["block"], marker="block.norm1")
    together = StepSketcher(model, loop, EXACT)
    got = together.sketch(losses, batch)
    padded = [{"tokens": batch["tokens"][[row]], "labels": batch["labels"][[row]]} for row in range(6)]
    alone = torch.cat([StepSketcher(model, loop, EXACT).sketch(losses, one) for one in padded])
    assert float((got - alone).norm() / alone.norm()) <= 1e-5
    owners = {entry.owners for entry in together.plan() if entry.uses}
    assert owners == {"dimension 1"}


class HiddenUse(InjectedModel):
    """Uses a parameter where torch's functions can't be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.block.gain = nn.Parameter(torch.randn(12))

    def forward(self, tokens: Tensor) -> Tensor:
        state = self.embed(tokens)
        for _ in range(self.num_steps):
            state = Scale.apply(self.block(state, tokens != 0), self.block.gain)
        return self.head((state * (tokens != 0)[:, :, None]).sum(1))


def test_a_use_that_cannot_be_seen_unties_the_body_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(HiddenUse)
    sketcher = StepSketcher(model, model.loop, EXACT)
    sketcher.sketch(losses, collate(EXAMPLES))
    assert "runs backwards once for each example" in caplog.text
    entries = sketcher.plan()
    assert {entry.path for entry in entries} == {"untied copies"}
    assert "custom autograd function" in entries[0].note


def test_the_plan_says_what_used_each_parameter_how_often_and_at_what_cost() -> None:
    model = make_model(InjectedModel)
    model.block.spare = nn.Linear(3, 3)
    sketcher = StepSketcher(model, model.loop, SketchConfig(width=256))
    with pytest.raises(ValueError, match="no plan before the first batch"):
        sketcher.plan()
    sketcher.sketch(losses, collate(EXAMPLES))
    entries = {entry.parameter: entry for entry in sketcher.plan()}
    assert list(entries) == list(sketcher.parameters)
    linear = entries["block.qkv.weight"]
    assert (linear.functions, linear.uses, linear.owners, linear.path) == ("linear", 4, "dimension 0", "product")
    assert linear.expected_ms is not None
    assert linear.measured_ms is not None
    assert entries["block.spare.weight"].uses == 0
    assert "not used" in entries["block.spare.weight"].note


class NeverRun(InjectedModel):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embed(tokens).sum(1))


def test_a_body_that_never_runs_is_an_error() -> None:
    model = make_model(NeverRun)
    with pytest.raises(ValueError, match="was never entered"):
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
    with pytest.raises(ValueError, match=r"an input of linear\(\) was changed in place"):
        StepSketcher(model, Loop(body=["block.mlp"])).sketch(losses, collate(EXAMPLES))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda values: values.mean(), r"gave \(\), expected one loss for each example"),
        (lambda values: values / torch.tensor([1.0, 0.0] + [1.0] * 5), r"examples \[1\] of the batch is not finite"),
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
    with pytest.raises(ValueError, match=r"'block.mlp.1', a Dropout, has dropout in training mode"):
        sketcher.sketch(losses, collate(EXAMPLES))
