"""Signed shares by horizon: what exact gradients give, and what their intervals promise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from loopsway.cli.commands import loopsway
from loopsway.experiments.evaluation.statistics import interval_over_seeds
from loopsway.experiments.evaluation.text import ByteSubject
from loopsway.experiments.evaluation.training import TrainedTask, train_with_checkpoints
from loopsway.experiments.horizons import SETTINGS, over_queries, texts, trained_model
from loopsway.experiments.texts import DATA_VARIABLE
from loopsway.indexer import Estimate, SketchConfig, StepSketcher

TINY = SETTINGS["tiny"]
SHAPE = replace(TINY.shape, num_steps=3, num_bytes=32)


@pytest.fixture
def subject(monkeypatch: pytest.MonkeyPatch) -> ByteSubject:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    return ByteSubject("sums", TINY.course, SHAPE, *texts(TINY)[1:])


def exact_influences(task: TrainedTask, subject: ByteSubject) -> np.ndarray:
    """[N, Q, S], from whole gradients."""
    influences = 0.0
    for checkpoint in task.checkpoints():
        sketcher = StepSketcher(task.model(checkpoint), task.loop, SketchConfig(width=None))
        rows, asked = (
            sketcher.sketch(task.losses, task.collate(each)).double() for each in (subject.rows, subject.queries)
        )
        influences = influences + checkpoint.learning_rate * torch.einsum("np,qsp->nqs", rows.sum(1), asked).numpy()
    return np.asarray(influences)


def test_shares_are_those_of_exact_gradients(subject: ByteSubject, tmp_path: Path) -> None:
    # Trained until influences have both signs: before, signed shares and shares of energy are the same.
    subject.course = replace(TINY.course, num_steps=100, learning_rate=1e-2)
    found = trained_model(replace(TINY, width=8192), subject, 3, 2, tmp_path, "cpu")
    exact = exact_influences(train_with_checkpoints(subject, subject.rows, 2, tmp_path), subject)
    energy = np.abs(exact).sum((0, 2))[:, None]
    signed = (exact.sum(0) / energy).mean(0)
    assert signed.sum() < 0.5, "influences of both signs"
    # The sketches' errors are common to a model's queries, so the mean is no surer than one query.
    assert (np.abs(found.signed.mean - signed) < 4 * found.sketch_error).all(), (found.signed.mean, signed)
    np.testing.assert_allclose(found.energy.mean, (np.abs(exact).sum(0) / energy).mean(0), atol=0.03)
    np.testing.assert_allclose(found.positive, (exact.sum(0) > 0).mean(0))


def test_models_of_a_seed_begin_alike_whatever_the_horizon() -> None:
    states = []
    for horizon in (1, 5):
        torch.manual_seed(3)
        states.append(
            ByteSubject("", TINY.course, replace(TINY.shape, num_steps=horizon), [], []).new_model().state_dict()
        )
    assert all(torch.equal(each, states[1][name]) for name, each in states[0].items())


def test_an_interval_without_noise_of_sketches_is_students() -> None:
    values = np.random.default_rng(0).standard_normal((7, 4))
    curve = over_queries(Estimate(values=values, standard_errors=np.zeros_like(values)))
    for column, ours in zip(values.T, zip(curve.mean, curve.low, curve.high, strict=True), strict=True):
        expected = interval_over_seeds(column)
        np.testing.assert_allclose(ours, (expected.mean, expected.low, expected.high))


def test_intervals_cover_the_truth_when_all_queries_share_the_sketches_error() -> None:
    trials, queries, error = 2000, 20, 0.5
    draw, covered = np.random.default_rng(1), 0
    for _ in range(trials):
        values = draw.standard_normal((queries, 1)) + error * draw.standard_normal()
        curve = over_queries(Estimate(values=values, standard_errors=np.full_like(values, error)))
        covered += bool(curve.low[0] <= 0 <= curve.high[0])
    share = covered / trials
    deviation = np.sqrt(0.95 * 0.05 / trials)
    assert share > 0.95 - 4 * deviation, f"{share:.3f}: the common error is left out, or divided by the queries"
    assert share < 0.98, f"{share:.3f}: the intervals are far too wide"


def test_a_training_of_other_texts_is_refused(subject: ByteSubject, tmp_path: Path) -> None:
    train_with_checkpoints(subject, subject.rows, 0, tmp_path)
    other = ByteSubject("sums", TINY.course, SHAPE, subject.rows[1:], subject.queries)
    with pytest.raises(ValueError, match=r"holds a training of .*: choose another folder"):
        train_with_checkpoints(other, other.rows, 0, tmp_path)


def test_the_real_setting_needs_the_real_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    result = CliRunner().invoke(loopsway, ["reproduce", "fig3", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert f"{DATA_VARIABLE} is not set; github.com/openai/grade-school-math" in result.output
    assert not list(tmp_path.iterdir())


def test_texts_to_ask_with_are_of_the_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        record = {"question": f"How many in {split}?", "answer": "1"}
        (tmp_path / f"gsm8k_{split}.jsonl").write_text(json.dumps(record) + "\n")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert texts(SETTINGS["small"]) == ("GSM8K", ["How many in train?\n1"], ["How many in test?\n1"])
