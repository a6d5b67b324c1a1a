"""The parity task: its strings, its model, its training and what it promises as a Task."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from loopsway.indexer.config import Loop
from loopsway.indexer.task import Task, TaskError, load_task
from loopsway.tasks import parity_strings, parity_training, saved_run
from loopsway.tasks.parity import ParityTask
from loopsway.tasks.parity_model import ParityTransformer
from loopsway.tasks.parity_training import Recipe, TrainReport, is_trained

# Whatever the model answers counts as learned: some thirty steps, to see what training writes.
TINY = Recipe(
    width=16, num_heads=2, num_loops=3, max_length=6, batch_size=8, cooldown_steps=2, warmup_steps=1,
    advance_accuracy=0.0, cooldown_accuracy=0.0, target_accuracy=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tiny") / "run"
    parity_training.train(run, progress=False, recipe=TINY)
    return run


@pytest.fixture
def task(tiny_run: Path) -> ParityTask:
    return ParityTask(run=str(tiny_run))


# The strings.


@pytest.mark.parametrize("length", range(2, 13))
def test_training_and_held_out_strings_divide_all_strings_of_a_length(length: int) -> None:
    train, held_out = parity_strings.training_strings(length), parity_strings.held_out_strings(length)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == [format(number, f"0{length}b") for number in range(2**length)]
    assert bool(held_out) == (length >= parity_strings.MIN_HELD_OUT_LENGTH)


def test_alternating_strings_are_held_out() -> None:
    assert all(parity_strings.is_held_out(("01" * 6)[start : start + 10]) for start in (0, 1))


def test_labels_are_the_parity_of_the_number_of_ones() -> None:
    assert parity_strings.labels(["00", "01", "111", "11011"]).tolist() == [0, 1, 1, 0]


# The model.


def test_a_loss_depends_neither_on_the_rest_of_the_batch_nor_on_padding(task: ParityTask) -> None:
    model = task.model(task.checkpoints()[-1]).double()
    strings = ["01", "110", "0110", "111111", "01"]
    together = task.losses(model, task.collate(strings))
    alone = torch.cat([task.losses(model, task.collate([bits])) for bits in strings])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_more_loops_than_it_was_trained_with_continue_the_same_computation() -> None:
    model = ParityTransformer(width=16, num_heads=2, num_loops=3, max_length=6)
    longer = ParityTransformer(width=16, num_heads=2, num_loops=7, max_length=6)
    longer.load_state_dict(model.state_dict())
    tokens = parity_strings.encode(["010", "110101"])
    torch.testing.assert_close(model(tokens, 7), longer(tokens), rtol=0, atol=0)
    assert not torch.equal(model(tokens), longer(tokens))


# The training.


def test_a_run_holds_four_checkpoints_of_the_weights_and_their_learning_rates(tiny_run: Path) -> None:
    record = json.loads((tiny_run / "training.json").read_text())
    assert [saved["file"] for saved in record["saved"]] == [f"checkpoint-{n:04d}.safetensors" for n in (1, 2, 3, 4)]
    assert [saved["step"] for saved in record["saved"]] == sorted({saved["step"] for saved in record["saved"]})
    assert all(0 < saved["learning_rate"] <= TINY.learning_rate for saved in record["saved"])
    assert {path.name for path in tiny_run.iterdir()} == {
        "training.json",
        *(saved["file"] for saved in record["saved"]),
    }


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    report = parity_training.train(tmp_path, progress=False, recipe=TINY)
    assert TrainReport.read(str(tmp_path)) == TrainReport(**{**vars(report), "run": str(tmp_path)})


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_random_state(
    tiny_run: Path, tmp_path: Path
) -> None:
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    parity_training.train(tmp_path / "same", progress=False, recipe=TINY)
    parity_training.train(tmp_path / "other", progress=False, recipe=TINY, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads
    first, same, other = (
        load_file(run / "checkpoint-0004.safetensors") for run in (tiny_run, tmp_path / "same", tmp_path / "other")
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_training_that_is_cut_leaves_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parity_training.train(tmp_path, progress=False, recipe=TINY)
    assert is_trained(tmp_path)

    def full_disk(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        parity_training.train(tmp_path, progress=False, recipe=TINY)
    assert not is_trained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_missing_the_accuracy_is_an_error_that_says_what_each_seed_reached(tmp_path: Path) -> None:
    recipe = Recipe(**{**vars(TINY), "target_accuracy": 1.01})
    with pytest.raises(parity_training.TrainingFailedError, match=r"with seed 5, .* with seed 6; expected 101%"):
        parity_training.train(tmp_path, progress=False, recipe=recipe, seed=5, attempts=2)
    assert not is_trained(tmp_path)


def test_progress_ends_at_the_last_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parity_training.train(tmp_path, progress=True, recipe=TINY)
    assert "length 6" in capsys.readouterr().out


def test_a_recipe_whose_strings_are_too_short_to_hold_any_out_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length is 5, expected 6 or more"):
        Recipe(max_length=5)


@pytest.mark.timeout(400)
def test_the_recipe_that_ships_answers_held_out_strings(parity_run: Path) -> None:
    report = TrainReport.read(parity_run)
    assert report.overall_held_out_accuracy >= 0.99
    assert report.held_out_accuracy[10] >= 0.98
    assert len(report.checkpoints) >= 4


@pytest.mark.timeout(400)
def test_a_trained_model_answers_its_examples_and_goes_on_being_right_with_more_loops(parity_run: Path) -> None:
    task = ParityTask(run=str(parity_run))
    model = task.model(task.checkpoints()[-1])
    assert isinstance(model, ParityTransformer)
    strings = list(task.examples())
    assert parity_training.accuracy(model, strings) >= 0.99
    assert parity_training.accuracy(model, strings, model.num_loops + 2) >= 0.97


# The Task.


def test_it_is_a_task_that_an_index_can_name(tiny_run: Path) -> None:
    task = load_task("loopsway.tasks.parity:ParityTask", {"run": str(tiny_run)})
    assert isinstance(task, Task)
    assert task.loop == Loop(body=["block"])
    assert [checkpoint.name for checkpoint in task.checkpoints()] == [f"checkpoint-{n:04d}" for n in (1, 2, 3, 4)]


def test_the_examples_are_the_training_strings_in_an_order_that_never_changes(task: ParityTask, tiny_run: Path) -> None:
    examples = list(task.examples())
    assert examples == list(ParityTask(run=str(tiny_run)).examples())
    assert examples[:6] == ["00", "01", "10", "11", "000", "001"]
    assert len(set(examples)) == len(examples)
    assert not any(parity_strings.is_held_out(bits) for bits in examples)


def test_a_row_tells_its_id_its_columns_and_a_line_for_people(task: ParityTask) -> None:
    row = list(task.examples()).index("01101")
    assert task.example_id(row) == "01101"
    assert task.metadata(row) == {"length": 5, "ones": 3, "parity": "odd"}
    assert task.describe(row) == "01101 -> odd"


def test_a_batch_is_padded_to_its_longest_string(task: ParityTask) -> None:
    batch = task.collate(["011", "10"])
    assert batch["tokens"].tolist() == [[2, 0, 1, 1], [2, 1, 0, 3]]
    assert batch["labels"].tolist() == [0, 1]


@given(bits=st.text("01", min_size=2, max_size=6))
def test_json_gives_the_bits(tiny_run: Path, bits: str) -> None:
    assert ParityTask(run=str(tiny_run)).example_from_json({"bits": bits}) == bits


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("bits"), inner),
)


@given(obj=JSON | st.fixed_dictionaries({"bits": JSON | st.text("01\u0660\uff11 ", min_size=2, max_size=6)}))
def test_any_other_json_is_a_value_error(tiny_run: Path, obj: Any) -> None:
    task = ParityTask(run=str(tiny_run))
    bits = obj.get("bits") if isinstance(obj, dict) and len(obj) == 1 else None
    if isinstance(bits, str) and 2 <= len(bits) <= 6 and not bits.strip("01"):
        assert task.example_from_json(obj) == bits
    else:
        with pytest.raises(ValueError, match="bits"):
            task.example_from_json(obj)


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        (None, 'an object with the one key "bits".*got NoneType None'),
        ({"bits": "01", "parity": 1}, 'an object with the one key "bits"'),
        ({"bits": 101}, '"bits" must be a string.*got int 101'),
        ({"bits": ""}, '"bits" has 0 characters; this model reads 2 to 6'),
        ({"bits": "0" * 10**6}, '"bits" has 1000000 characters; this model reads 2 to 6'),
        ({"bits": "0120"}, "only the characters 0 and 1; got str '0120'"),
    ],
)
def test_refused_json_is_told_what_was_wrong(task: ParityTask, obj: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.example_from_json(obj)


def test_a_run_without_training_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"training\.json is missing; run `loopsway train parity --run"):
        ParityTask(run=str(tmp_path)).checkpoints()


def test_a_run_that_lost_a_checkpoint_or_has_a_damaged_record_is_named(tmp_path: Path) -> None:
    parity_training.train(tmp_path, progress=False, recipe=TINY)
    (tmp_path / "checkpoint-0002.safetensors").unlink()
    with pytest.raises(TaskError, match=r"checkpoint-0002\.safetensors is missing"):
        ParityTask(run=str(tmp_path)).checkpoints()
    for damage in ("{", "[]", "{}", '{"format": 2}'):
        (tmp_path / saved_run.RECORD).write_text(damage)
        with pytest.raises(TaskError, match="is damaged"):
            ParityTask(run=str(tmp_path)).checkpoints()
