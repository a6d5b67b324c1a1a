"""Our influences against those of the method's authors' package, step-decomposed-influence 0.1.1 (`import sdi`).

N training examples, Q queries, S steps, W width, m floats that the reference keeps for each parameter tensor and step.

Exactly, the two must agree. Sketched, ours must be no further from the truth at equal stored floats, and at a 32nd of
the stored bytes. All influences are of the default resolution, QUERY_STEP: [N, Q, S].

The latter needs a body that has small tensors (biases, norms) besides its matrices, as these models have: the reference
spends m floats on each of them. On four bare matrices one bit costs more than fusing gains; see benchmarks/RESULTS.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from sdi import FullGradientTracInSDI, ProjectedTracInSDI
from sdi.estimators import compute_query_sdi
from torch import Tensor, nn

from looped import (
    PADDING,
    CellModel,
    InjectedModel,
    Labelled,
    RangeModel,
    collate,
    losses,
    make_examples,
    make_model,
    step_gradients,
)
from loopsway.indexer import SketchConfig, StepSketcher
from loopsway.indexer.sketches.coding import decode, encode
from loopsway.indexer.sketches.rotation import rotate

NUM_TRAIN, NUM_QUERIES = 16, 6
TRIALS = 24  # seeds over which an error is averaged

# torch says so of every module whose input needs no gradient; the reference's hooks fire all the same.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")


class OneNormModel(CellModel):
    """CellModel with its norm called once a step: the reference refuses a module that is called twice in a step."""

    class Cell(CellModel.Cell):
        def forward(self, state: Tensor, tokens: Tensor) -> Tensor:
            looked_up = (self.embed(tokens) * (tokens != PADDING)[:, :, None]).sum(1)
            gate = torch.sigmoid(self.gate(torch.cat([self.norm(state), looked_up], dim=-1)))
            return state + gate * torch.tanh(self.update(state + looked_up))


@dataclass(frozen=True)
class Setting:
    """A model that both packages can attribute to, and examples.

    Attributes:
        kind: of the model.
        width: of our sketches.
        arguments: for the model's constructor.
        longest: tokens of an example at the most.
        silent_steps: first steps, without gradient: zeros of ours, left out by the reference.
    """

    kind: type[Any]
    width: int
    arguments: dict[str, int] = field(default_factory=dict)
    longest: int = 6
    silent_steps: int = 0

    def model(self) -> Any:
        return make_model(self.kind, **self.arguments)

    def split(self) -> tuple[list[Labelled], list[Labelled]]:
        examples = make_examples(NUM_TRAIN + NUM_QUERIES, longest=self.longest)
        return examples[:NUM_TRAIN], examples[NUM_TRAIN:]


SETTINGS = {
    "injected": Setting(InjectedModel, 512),
    "truncated": Setting(RangeModel, 256, silent_steps=1),
    "cell": Setting(OneNormModel, 128),
    "parity-sized": Setting(InjectedModel, 1024, {"dim": 32, "num_steps": 8}, longest=12),
}
settings = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())


def influences(train: Tensor, queries: Tensor) -> Tensor:
    """[N, S, P] and [Q, S, P] give QUERY_STEP influences [N, Q, S]."""
    return torch.einsum("np,qsp->nqs", train.sum(1), queries)


def true_influences(setting: Setting) -> Tensor:
    model, (train, queries) = setting.model(), setting.split()
    gradients = [step_gradients(model, model.loop, examples) for examples in (train, queries)]
    return influences(*gradients)


def reference_influences(setting: Setting, estimator: FullGradientTracInSDI | ProjectedTracInSDI) -> Tensor:
    """The reference's, [N, Q, S], with zeros for the steps that it leaves out."""
    train, queries = (
        estimator.featurize_loader(loader=[collate(examples)], loss_fn=losses) for examples in setting.split()
    )
    estimator.close()
    return nn.functional.pad(compute_query_sdi(train=train, query=queries), (setting.silent_steps, 0))


def reference_body(model: nn.Module) -> Sequence[nn.Module]:
    """The modules of the loop's body, as the reference wants to be told."""
    return [child for name, child in model.named_children() if name in ("block", "layers", "cell")]


def coded_influences(setting: Setting, model: Any, bits: int, seed: int) -> Tensor:
    """Ours, as searched: the training examples' coded totals against the queries' float32 steps."""
    sketcher = StepSketcher(model, model.loop, SketchConfig(width=setting.width, bits=bits, seed=seed))
    train, queries = (rotate(sketcher.sketch(losses, collate(examples)), seed) for examples in setting.split())
    coded = encode(train.sum(1), bits)
    return influences(torch.from_numpy(decode(coded.codes, coded.factors, bits)).unsqueeze(1), queries)


def projection_of_equal_storage(setting: Setting, num_tensors: int) -> int:
    """The reference's m such that it stores as many floats as our row has coordinates, factor and norm included.

    With 1 bit our row is W bits and two float32 numbers, so the reference stores 32 times the bytes.
    """
    return math.ceil((setting.width + 64) / num_tensors)


def relative_error(estimate: Tensor, truth: Tensor) -> float:
    return float((estimate.double() - truth).norm() / truth.norm())


@settings
def test_exact_influences_equal_the_reference_s_full_gradient_influences(setting: Setting) -> None:
    truth, model = true_influences(setting), setting.model()
    theirs = reference_influences(
        setting, FullGradientTracInSDI(model=model, target_modules=reference_body(model), loss_reduction="sum")
    )
    sketcher = StepSketcher(model, model.loop, SketchConfig(width=None))
    ours = influences(*(sketcher.sketch(losses, collate(examples)) for examples in setting.split()))
    assert relative_error(theirs, truth) <= 1e-4, "the reference differs from the untied copies"
    assert relative_error(ours, truth) <= 1e-4, "we differ from the untied copies"
    assert relative_error(ours, theirs.double()) <= 1e-4


@settings
@pytest.mark.parametrize("bits", [32, 1])
def test_sketched_influences_are_no_further_from_the_truth_than_the_reference_s(setting: Setting, bits: int) -> None:
    truth, model = true_influences(setting), setting.model()
    body = reference_body(model)
    num_tensors = sum(1 for part in body for _ in part.parameters())
    projection = projection_of_equal_storage(setting, num_tensors)
    ours, theirs = [], []
    for seed in range(TRIALS):
        estimator = ProjectedTracInSDI(model=model, target_modules=body, projection_size=projection, seed=seed)
        theirs.append(relative_error(reference_influences(setting, estimator), truth))
        ours.append(relative_error(coded_influences(setting, model, bits, seed), truth))
    our_mean, their_mean = (sum(errors) / TRIALS for errors in (ours, theirs))
    assert our_mean <= their_mean, (
        f"mean relative error over {TRIALS} seeds at width {setting.width} and {bits} bits is {our_mean:.3f}, the "
        f"reference's with {projection} floats for each of {num_tensors} tensors is {their_mean:.3f}"
    )
