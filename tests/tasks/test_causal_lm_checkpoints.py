"""Checkpoints as the Hugging Face Trainer and peft leave them: their order, rates, weights and second moments."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_lms import new_adapter, new_model, write_model, write_rows, write_run
from loopsway.indexer.task import TaskError
from loopsway.tasks.causal_lm import CausalLMTask

LOOP = "model.layers.0-1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The Trainer's folder of a tiny llama, and the Trainer."""
    return write_run(tmp_path_factory.mktemp("trainer") / "run", "llama")


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """A base model's folder, the Trainer's folder of an adapter of it, and the Trainer."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("adapter")
    base = write_model(root / "base")
    model = new_adapter(AutoModelForCausalLM.from_pretrained(base, local_files_only=True))
    return base, *write_run(root / "run", "llama", model=model)


@pytest.fixture
def copy(run: tuple[Path, Any], tmp_path: Path) -> Path:
    """The run's folder, to be changed."""
    return Path(shutil.copytree(run[0], tmp_path / "run"))


def first_model(folder: Path) -> torch.nn.Module:
    task = CausalLMTask(str(folder), loop=LOOP)
    return task.model(task.checkpoints()[0])


# Folders.


def test_a_run_is_its_checkpoints_in_the_order_of_their_steps(copy: Path) -> None:
    shutil.copytree(copy / "checkpoint-4", copy / "checkpoint-10")
    task = CausalLMTask(str(copy), loop=LOOP, learning_rate=0.1)
    assert [checkpoint.name for checkpoint in task.checkpoints()] == ["checkpoint-2", "checkpoint-4", "checkpoint-10"]
    assert [Path(str(checkpoint.path)).name for checkpoint in task.checkpoints()] == ["model.safetensors"] * 3
    assert task.example_from_json({"text": "a cat"}).ids  # by the tokenizer in the run's own folder


def test_each_checkpoint_has_its_own_weights(run: tuple[Path, Any]) -> None:
    folder, trainer = run
    task = CausalLMTask(str(folder), loop=LOOP)
    early, late = (task.model(checkpoint).state_dict() for checkpoint in task.checkpoints())
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(late[name], value, rtol=0, atol=0)
    assert not all(torch.equal(early[name], late[name]) for name in late)


@pytest.mark.parametrize("several", [True, False])
def test_several_folders_are_several_checkpoints(run: tuple[Path, Any], several: bool) -> None:
    folders = [str(run[0] / "checkpoint-4"), str(run[0] / "checkpoint-2")]
    task = CausalLMTask(folders if several else ", ".join(folders), loop=LOOP)
    assert [checkpoint.name for checkpoint in task.checkpoints()] == ["checkpoint-4", "checkpoint-2"]


def test_folders_of_one_name_are_told_apart_by_their_paths(run: tuple[Path, Any], copy: Path) -> None:
    folders = [str(run[0] / "checkpoint-2"), str(copy / "checkpoint-2")]
    task = CausalLMTask(folders, loop=LOOP)
    assert [checkpoint.name for checkpoint in task.checkpoints()] == folders


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), r"model folder .* does not exist .* local folders only"),
        (lambda folder: (folder / "config.json").unlink(), r"holds no model: config\.json is missing"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"holds no \.safetensors file; other formats can run"),
        (lambda folder: (folder / "config.json").write_text("{"), "the model's configuration in .* can't be loaded"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "no"}'), "can't be loaded .ValueError"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 99), "the model in .* can't be loaded"),
    ],
)
def test_a_folder_that_is_not_whole_is_named(tmp_path: Path, copy: Path, damage: Any, message: str) -> None:
    folder = copy / "checkpoint-2"
    damage(folder)
    with pytest.raises(TaskError, match=message):
        first_model(folder)


def test_weights_that_lack_a_parameter_are_refused(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = copy / "checkpoint-2" / "model.safetensors"
    weights = load_file(file)
    del weights["model.norm.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    task = CausalLMTask(str(file.parent), loop=LOOP)
    with pytest.raises(TaskError, match=r"lack 1 of the model's parameters \(model\.norm\.weight\)"):
        task.model(task.checkpoints()[0])


def test_a_folder_named_twice_is_refused(run: tuple[Path, Any]) -> None:
    with pytest.raises(TaskError, match="is named twice"):
        CausalLMTask([str(run[0]), str(run[0] / "checkpoint-2")], loop=LOOP)
    with pytest.raises(TaskError, match="no model folder was named"):
        CausalLMTask(" ,", loop=LOOP)


# Learning rates.


def test_learning_rates_are_those_that_the_trainer_logged_at_each_step(run: tuple[Path, Any]) -> None:
    folder, trainer = run
    logged = {entry["step"]: entry.get("learning_rate") for entry in trainer.state.log_history if "loss" in entry}
    rates = [checkpoint.learning_rate for checkpoint in CausalLMTask(str(folder), loop=LOOP).checkpoints()]
    assert rates == [logged[2], logged[4]]
    assert rates == pytest.approx([0.0075, 0.0025])


def test_without_a_record_the_rate_is_1_and_that_is_said(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    for file in copy.glob("*/trainer_state.json"):
        file.unlink()
    with caplog.at_level(logging.WARNING):
        assert [checkpoint.learning_rate for checkpoint in CausalLMTask(str(copy), loop=LOOP).checkpoints()] == [1, 1]
    assert "no learning rate is recorded beside" in caplog.text
    caplog.clear()
    CausalLMTask(str(copy), loop=LOOP, learning_rate=0.1).checkpoints()
    assert not caplog.text


@pytest.mark.parametrize(("given", "expected"), [(0.5, [0.5, 0.5]), ("0.5, 0.25", [0.5, 0.25]), ([1, 2], [1, 2])])
def test_learning_rates_that_are_given_are_taken(run: tuple[Path, Any], given: Any, expected: list[float]) -> None:
    checkpoints = CausalLMTask(str(run[0]), loop=LOOP, learning_rate=given).checkpoints()
    assert [checkpoint.learning_rate for checkpoint in checkpoints] == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fast", "learning_rate is 'fast', expected a number, or one for each checkpoint"),
        (0, "learning_rate is 0, expected numbers > 0"),
        ("1,nan", "expected numbers > 0"),
        ([1, 2, 3], "learning_rate has 3 numbers for 2 checkpoints"),
    ],
)
def test_wrong_learning_rates_are_refused(run: tuple[Path, Any], given: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        CausalLMTask(str(run[0]), loop=LOOP, learning_rate=given).checkpoints()


def test_a_record_that_is_damaged_or_there_for_some_only_is_named(copy: Path) -> None:
    record = copy / "checkpoint-2" / "trainer_state.json"
    for damage in ("{", "[]", "{}", '{"global_step": 2, "log_history": [1]}'):
        record.write_text(damage)
        with pytest.raises(TaskError, match=r"trainer_state\.json (can't be read|is damaged)"):
            CausalLMTask(str(copy), loop=LOOP).checkpoints()
    record.unlink()
    with pytest.raises(TaskError, match=r"recorded for some checkpoints and not for .*checkpoint-2"):
        CausalLMTask(str(copy), loop=LOOP).checkpoints()


# Second moments.


@pytest.mark.parametrize("kind", ["llama", "gpt2", "dory"])
def test_second_moments_are_the_trainers_own_by_name_without_their_bias(tmp_path: Path, kind: str) -> None:
    folder, trainer = write_run(tmp_path / "run", kind)
    task = CausalLMTask(str(folder), loop="transformer.h.0-1" if kind == "gpt2" else LOOP)
    moments = task.second_moments(task.checkpoints()[-1])
    assert moments is not None
    kept = trainer.optimizer.optimizer.state if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.state
    expected = {name: kept[parameter] for name, parameter in trainer.model.named_parameters() if parameter in kept}
    assert moments.keys() == expected.keys()
    assert len(moments) == len(list(trainer.model.parameters()))
    for name, moment in moments.items():
        correction = 1 - 0.999 ** int(expected[name]["step"])  # by the Trainer's default beta2
        torch.testing.assert_close(moment * correction, expected[name]["exp_avg_sq"], rtol=1e-6, atol=0)


def test_without_an_optimizers_file_there_are_no_second_moments(copy: Path) -> None:
    task = CausalLMTask(str(copy), loop=LOOP)
    (copy / "checkpoint-2" / "optimizer.pt").unlink()
    assert task.second_moments(task.checkpoints()[0]) is None
    assert task.second_moments(task.checkpoints()[1]) is not None


def changed(file: Path, kind: str) -> None:
    """The optimizer's file, as another optimizer, another model or a fault would leave it."""
    if kind == "bytes":
        file.write_bytes(b"nonsense")
        return
    saved = torch.load(file, weights_only=True)
    if kind == "group":
        saved["param_groups"][0]["params"].pop()
    elif kind == "optimizer":
        saved["state"] = {number: {"momentum_buffer": kept["exp_avg"]} for number, kept in saved["state"].items()}
    elif kind == "order":
        saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]
    torch.save([1] if kind == "list" else saved, file)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bytes", "can't be read as an optimizer's state"),
        ("list", "can't be read as an optimizer's state"),
        ("group", r"keeps parameters in groups of \[\d+, 7\], but the Trainer would group this model's into"),
        ("optimizer", "keeps no exp_avg_sq for model.embed_tokens.weight: .* Adam or AdamW"),
        ("order", r"keeps a second moment of shape \(16, 16\) where model.embed_tokens.weight has \(288, 16\)"),
    ],
)
def test_an_optimizers_file_that_does_not_fit_is_named(copy: Path, kind: str, message: str) -> None:
    changed(copy / "checkpoint-2" / "optimizer.pt", kind)
    task = CausalLMTask(str(copy), loop=LOOP)
    with pytest.raises(TaskError, match=message):
        task.second_moments(task.checkpoints()[0])


def test_code_in_an_optimizers_file_is_not_run(copy: Path) -> None:
    file = copy / "checkpoint-2" / "optimizer.pt"
    torch.save({"state": Path("x"), "param_groups": []}, file)
    task = CausalLMTask(str(copy), loop=LOOP)
    with pytest.raises(TaskError, match="UnpicklingError"):
        task.second_moments(task.checkpoints()[0])


# Adapters.


def test_of_an_adapter_only_its_own_parameters_are_attributed(adapter_run: tuple[Path, Path, Any]) -> None:
    _base, folder, trainer = adapter_run
    task = CausalLMTask(str(folder), loop=LOOP)
    assert task.loop.marker == "base_model.model.model.layers.0"
    assert list(task.loop.body) == ["base_model.model.model.layers.0", "base_model.model.model.layers.1"]
    model = task.model(task.checkpoints()[-1])
    modules = dict(model.named_modules())
    assert all(name in modules for name in task.loop.body)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 3 * 2 * 2
    assert all(".lora_" in name for name in trained)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], parameter, rtol=0, atol=0)
    assert not model.training


def test_an_adapters_losses_and_second_moments_are_those_of_its_training(
    adapter_run: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    base, folder, trainer = adapter_run
    task = CausalLMTask(str(folder), str(write_rows(tmp_path / "rows.jsonl")), LOOP, dtype="float64")
    model = task.model(task.checkpoints()[-1])
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    batch = task.collate(task.examples())
    ours = task.losses(model, batch)
    torch.testing.assert_close(ours, task.losses(trainer.model.eval(), batch).double(), rtol=1e-4, atol=1e-4)
    plain = CausalLMTask(str(base), loop=LOOP, dtype="float64")
    assert not torch.allclose(ours, task.losses(plain.model(plain.checkpoints()[0]), batch), rtol=1e-3)
    moments = task.second_moments(task.checkpoints()[-1])
    assert moments is not None
    assert moments.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_an_adapter_is_found_beside_its_base_model_or_with_a_base_that_is_given(
    adapter_run: tuple[Path, Path, Any], tmp_path: Path
) -> None:
    base, folder, _trainer = adapter_run
    checkpoint = folder / "checkpoint-4"
    beside = Path(shutil.copytree(base, tmp_path / "beside"))
    for file in checkpoint.glob("adapter_*"):
        shutil.copy(file, beside)
    alone = Path(shutil.copytree(checkpoint, tmp_path / "alone"))
    config = json.loads((alone / "adapter_config.json").read_text())
    (alone / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/model"}))
    with pytest.raises(TaskError, match=r"belongs to the model 'someone/model', which is no model's folder here"):
        CausalLMTask(str(alone), loop=LOOP)
    tasks = [
        CausalLMTask(str(checkpoint), loop=LOOP),
        CausalLMTask(str(beside), loop=LOOP),
        CausalLMTask(str(alone), loop=LOOP, base=str(base)),
    ]
    first, *others = [dict(task.model(task.checkpoints()[0]).named_parameters()) for task in tasks]
    for other in others:
        assert {name: value.requires_grad for name, value in other.items()} == {
            name: value.requires_grad for name, value in first.items()
        }
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_an_adapter_that_is_not_whole_is_named(adapter_run: tuple[Path, Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(adapter_run[1] / "checkpoint-2", tmp_path / "adapter"))
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")
    task = CausalLMTask(str(folder), loop=LOOP)
    with pytest.raises(TaskError, match=r"the adapter in .* can't be loaded .*[Mm]issing adapter keys"):
        task.model(task.checkpoints()[0])
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(TaskError, match=r"an adapter's configuration, but no adapter_model\.safetensors"):
        CausalLMTask(str(folder), loop=LOOP)


def test_a_learned_prompt_is_refused(adapter_run: tuple[Path, Path, Any], tmp_path: Path) -> None:
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    new_adapter(new_model("llama"), config).save_pretrained(tmp_path)
    task = CausalLMTask(str(tmp_path), loop=LOOP, base=str(adapter_run[0]))
    with pytest.raises(TaskError, match="is a learned prompt"):
        task.model(task.checkpoints()[0])
