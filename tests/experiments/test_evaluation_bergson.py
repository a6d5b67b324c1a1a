"""bergson beside the evaluation's methods: its loop unrolled is the same model, and its gradients are autograd's."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from loopsway.cli.commands import loopsway
from loopsway.experiments.evaluation.bergson_program import unroll
from loopsway.experiments.evaluation.parity import Labelled, ParitySubject
from loopsway.experiments.evaluation.peer import Bergson
from loopsway.experiments.evaluation.predictions import BERGSON, BERGSON_ADDED, MAGIC
from loopsway.experiments.evaluation.training import (
    BETAS,
    CLIP_NORM,
    TrainedTask,
    drawn_batches,
    train_with_checkpoints,
)

PYTHON = os.environ.get("LOOPSWAY_BERGSON_PYTHON")
SUBJECT = ParitySubject(tiny=True)


def unrolled(model: torch.nn.Module) -> tuple[torch.nn.Module, list[list[str]]]:
    model = copy.deepcopy(model)
    batch = SUBJECT.collate(SUBJECT.queries)
    return model, unroll(model, SUBJECT.body, lambda model: SUBJECT.losses(model, batch))


def test_an_unrolled_loop_has_the_same_losses_and_its_copies_gradients_add_up() -> None:
    looped, batch = SUBJECT.new_model(), SUBJECT.collate(SUBJECT.queries)
    model, steps = unrolled(looped)
    losses = [SUBJECT.losses(each, batch) for each in (looped, model)]
    assert torch.equal(*losses)
    for each in losses:
        each.sum().backward()
    assert len(steps) == 2
    for names in zip(*steps, strict=True):
        whole = looped.get_parameter(f"block.{names[0].removeprefix('block.copies.0.')}.weight").grad
        copies = [model.get_parameter(f"{name}.weight").grad for name in names]
        torch.testing.assert_close(sum(each for each in copies if each is not None), whole)


def test_a_python_without_bergson_is_refused() -> None:
    with pytest.raises(ValueError, match=f"{sys.executable} has no bergson"):
        Bergson(python=Path(sys.executable), subject="parity", tiny=True)


def linear_gradients(task: TrainedTask, examples: Sequence[Labelled]) -> list[np.ndarray]:
    """Of each checkpoint's linear layers in the body, one example at a time by autograd: [N, S, P] each."""
    found = []
    for checkpoint in task.checkpoints():
        model, steps = unrolled(task.model(checkpoint))
        names = [[f"{name}.{part}" for name in step for part in ("weight", "bias")] for step in steps]
        parameters = [model.get_parameter(name) for step in names for name in step]
        rows = []
        for example in examples:
            loss = SUBJECT.losses(model, SUBJECT.collate([example])).sum()
            flat = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])
            rows.append(flat.unflatten(0, (len(steps), -1)))
        found.append(torch.stack(rows).double().numpy())
    return found


@pytest.mark.skipif(not PYTHON, reason="LOOPSWAY_BERGSON_PYTHON names no Python that has bergson")
def test_bergson_says_what_autograd_does_of_the_bodys_linear_layers(tmp_path: Path) -> None:
    assert PYTHON
    task = train_with_checkpoints(SUBJECT, SUBJECT.rows, 0, tmp_path)
    found = Bergson(python=Path(PYTHON), subject="parity", tiny=True).predict(task, SUBJECT.queries, tmp_path, 0)
    rates = [checkpoint.learning_rate for checkpoint in task.checkpoints()]
    gradients = [linear_gradients(task, each) for each in (SUBJECT.rows, SUBJECT.queries)]
    pairs = [*zip(*gradients, rates, strict=True)]
    apart = sum(rate * np.einsum("qsp,nsp->qn", asked, rows) for rows, asked, rate in pairs)
    added = sum(rate * asked.sum(1) @ rows.sum(1).T for rows, asked, rate in pairs)
    np.testing.assert_allclose(found.influences[BERGSON], apart, atol=1e-5 * np.abs(apart).max())
    np.testing.assert_allclose(found.influences[BERGSON_ADDED], added, atol=1e-5 * np.abs(added).max())
    own = sum(rate * (rows**2).sum((1, 2)) for rows, _, rate in pairs)
    np.testing.assert_allclose(found.self_influences[BERGSON], own, rtol=1e-4)


def trained_losses(weights: torch.Tensor) -> torch.Tensor:
    """The queries' losses after a training, in float64, whose batches are means by these weights."""
    course, rows = SUBJECT.course, SUBJECT.rows
    torch.manual_seed(0)
    model = SUBJECT.new_model().double()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=course.weight_decay, betas=BETAS)
    for step, batch in enumerate(drawn_batches(course, len(rows), 0)):
        optimizer.param_groups[0]["lr"] = course.learning_rate_at(step)
        losses, mine = SUBJECT.losses(model, SUBJECT.collate([rows[row] for row in batch.tolist()])), weights[batch]
        optimizer.zero_grad()
        ((mine * losses).sum() / mine.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
    return SUBJECT.losses(model, SUBJECT.collate(SUBJECT.queries)).detach()


@pytest.mark.skipif(not PYTHON, reason="LOOPSWAY_BERGSON_PYTHON names no Python that has bergson")
def test_magic_is_the_derivative_of_the_training(tmp_path: Path) -> None:
    assert PYTHON
    task = train_with_checkpoints(SUBJECT, SUBJECT.rows, 0, tmp_path)
    peer = Bergson(python=Path(PYTHON), subject="parity", tiny=True, magic=True)
    found = torch.from_numpy(peer.predict(task, SUBJECT.queries, tmp_path, 0).influences[MAGIC])
    rows = torch.cat([*drawn_batches(SUBJECT.course, len(SUBJECT.rows), 0)])[::25].unique()
    for row in rows.tolist():
        change = torch.zeros(len(SUBJECT.rows), dtype=torch.float64)
        change[row] = 1e-4
        slope = (trained_losses(1 + change) - trained_losses(1 - change)) / 2e-4
        torch.testing.assert_close(found[:, row], -slope, rtol=0.02, atol=1e-3 * found.abs().max().item())


def test_magic_is_bergsons() -> None:
    done = CliRunner(env={"LOOPSWAY_BERGSON_PYTHON": None}).invoke(loopsway, ["evaluate", "parity", "--magic"])
    assert done.exit_code == 2
    assert "--bergson-python names a Python that has it" in done.output
