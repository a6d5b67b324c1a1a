"""An evaluation end to end, tiny; and what its retraining and training promise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from loopsway.cli.commands import loopsway
from loopsway.cli.evaluate import SUBJECTS as NAMES
from loopsway.experiments.evaluation.evaluation import BEYOND, CEILING, DETECTION, REMOVAL, SCORE, SEED_MEAN, Amount
from loopsway.experiments.evaluation.parity import ParitySubject
from loopsway.experiments.evaluation.peer import WITHOUT_BERGSON
from loopsway.experiments.evaluation.predictions import (
    ADAM,
    COSINE,
    EXACT,
    FIRST_STEP,
    LAST_STEP,
    LOSS,
    RANDOM,
    SAME_STEPS,
    TRACIN,
)
from loopsway.experiments.evaluation.predictors import predict
from loopsway.experiments.evaluation.retraining import KeptRetraining
from loopsway.experiments.evaluation.subjects import SUBJECTS, make_subject
from loopsway.experiments.evaluation.text import TextSubject
from loopsway.experiments.evaluation.training import query_losses, train, train_with_checkpoints
from loopsway.experiments.texts import DATA_VARIABLE

SMALL_RUN = ["--tiny", "--subsets", "4", "--seeds", "2", "--removals", "1"]


@pytest.fixture(scope="module")
def subject() -> ParitySubject:
    return ParitySubject(tiny=True)


def all_rows(subject: ParitySubject) -> np.ndarray:
    return np.ones(len(subject.rows), bool)


def test_the_command_writes_results_and_goes_on_where_it_was(tmp_path: Path) -> None:
    command = ["evaluate", "parity", "--out", str(tmp_path), *SMALL_RUN]
    first = CliRunner(env={"LOOPSWAY_BERGSON_PYTHON": None}).invoke(loopsway, command, catch_exceptions=False)
    assert first.exit_code == 0, first.output
    assert WITHOUT_BERGSON in first.output
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {result["test"] for result in results} == {SCORE, SEED_MEAN, BEYOND, DETECTION, REMOVAL}
    scored = {result["method"] for result in results if result["test"] == SCORE}
    assert {TRACIN, EXACT, LOSS, RANDOM, CEILING, FIRST_STEP, LAST_STEP, "query step 0"} <= scored
    removed = {result["method"] for result in results if result["test"] == REMOVAL}
    steps = {f"{side} step {step}" for side in ("query", "train") for step in (0, 1)}
    assert {TRACIN, ADAM, COSINE, FIRST_STEP, LAST_STEP, LOSS, RANDOM} | steps <= removed
    detected = {result["method"] for result in results if result["test"] == DETECTION}
    assert {TRACIN, ADAM, FIRST_STEP, LAST_STEP, "query step 0", "query step 1", LOSS} <= detected
    assert pq.read_table(tmp_path / "results.parquet").num_rows == len(results)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    retrained = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("*") if file.is_file()}
    next(iter((tmp_path / "work/retrained").glob("*.npy"))).unlink()
    assert CliRunner(env={"LOOPSWAY_BERGSON_PYTHON": None}).invoke(loopsway, command).exit_code == 0
    changed = [file.name for file, made in retrained.items() if file.stat().st_mtime_ns != made]
    assert len(changed) == 1
    assert json.loads((tmp_path / "results.json").read_text())["results"] == results


def test_the_index_predicts_what_the_reference_does_with_exact_gradients(
    subject: ParitySubject, tmp_path: Path
) -> None:
    task = train_with_checkpoints(subject, subject.rows, 0, tmp_path)
    found = predict(task, subject.queries, tmp_path, 0)
    ours, exact = found.influences[TRACIN], found.influences[EXACT]
    assert np.linalg.norm(ours - exact) < 0.1 * np.linalg.norm(exact)
    steps = sum(found.influences[f"query step {step}"] for step in range(2))
    np.testing.assert_allclose(steps, ours, rtol=1e-3, atol=1e-4 * np.abs(ours).max())
    same = found.influences[FIRST_STEP] + found.influences[LAST_STEP]
    np.testing.assert_allclose(found.influences[SAME_STEPS], same)
    own = found.self_influences  # steps from whole sketches, the total from its code's norm
    np.testing.assert_allclose(own["query step 0"] + own["query step 1"], own[TRACIN], rtol=1e-3)


def test_a_training_depends_on_its_seed_and_its_rows_alone(subject: ParitySubject) -> None:
    def losses(kept: np.ndarray, seed: int) -> np.ndarray:
        torch.rand(1)  # the global random state is of no matter
        return query_losses(subject, train(subject, subject.rows, kept, seed))

    kept = all_rows(subject)
    part = kept.copy()
    part[::2] = False
    assert np.array_equal(losses(kept, 0), losses(kept, 0))
    assert not np.array_equal(losses(kept, 0), losses(kept, 1))
    assert not np.array_equal(losses(kept, 0), losses(part, 0))


def test_leaving_out_what_no_batch_had_changes_nothing(subject: ParitySubject) -> None:
    drawn = torch.randperm(len(subject.rows), generator=torch.Generator().manual_seed(0))
    seen = subject.course.num_steps * subject.course.batch_size
    assert seen < len(subject.rows), "the tiny course ends within one epoch"
    kept = all_rows(subject)
    kept[drawn[seen:].numpy()] = False
    ours, full = (query_losses(subject, train(subject, subject.rows, rows, 0)) for rows in (kept, all_rows(subject)))
    assert np.array_equal(ours, full)


def test_keeping_checkpoints_does_not_change_the_training(subject: ParitySubject, tmp_path: Path) -> None:
    train_with_checkpoints(subject, subject.rows, 0, tmp_path)
    recorded = json.loads((tmp_path / "run.json").read_text())["query_losses"]
    again = query_losses(subject, train(subject, subject.rows, all_rows(subject), 0))
    assert np.array_equal(np.float32(recorded), again)


def test_outcomes_of_another_course_are_refused(subject: ParitySubject, tmp_path: Path) -> None:
    KeptRetraining(subject, tmp_path)
    with pytest.raises(ValueError, match="choose another folder"):
        KeptRetraining(ParitySubject(), tmp_path)


def test_amounts_and_names_that_say_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="num_subsets is 1"):
        Amount(num_subsets=1)
    with pytest.raises(ValueError, match="seeds are"):
        Amount(seeds=(0, 0))
    with pytest.raises(ValueError, match="no subject 'poems'"):
        make_subject("poems")
    assert tuple(SUBJECTS) == NAMES


def test_texts_come_from_the_named_folder_and_else_are_made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert "sums in words" in TextSubject(tiny=True).name
    for split, question in {"train": "How many?", "test": "How far?"}.items():
        (tmp_path / f"gsm8k_{split}.jsonl").write_text(json.dumps({"question": question, "answer": "1"}) + "\n")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    named = TextSubject(tiny=True)
    assert (named.rows, named.queries, named.name) == (["How many?"], ["How far?"], "text (GSM8K)")
    (tmp_path / "gsm8k_test.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=f"does not exist; set {DATA_VARIABLE}"):
        TextSubject(tiny=True)


def test_a_text_is_trained_on_and_sketched_as_the_reference_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    subject = TextSubject(tiny=True)
    found = predict(train_with_checkpoints(subject, subject.rows, 0, tmp_path), subject.queries, tmp_path, 0)
    ours, exact = found.influences[TRACIN], found.influences[EXACT]
    assert np.linalg.norm(ours - exact) < 0.1 * np.linalg.norm(exact)
