"""`loopsway build --hf`, and all that follows from it: the index of a Hugging Face model is searched and served."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from causal_lms import ROWS, write_model, write_rows, write_run
from loopsway.cli.child import running_server
from loopsway.client import Client, ExampleQuery
from loopsway.indexer import ExampleSketcher, load_task, open_index

from .conftest import invoke, run

QUERY = {"prompt": "two and three", "completion": " are five"}
LOOPS = {"llama": ("model.layers.0-2", 1), "gpt2": ("transformer.h.0-1", 1), "dory": ("model.layers.1-2", 3)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def trained_index(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """An index of the two checkpoints of a Trainer's run, whose model applies its loop three times."""
    folder = tmp_path_factory.mktemp("trained")
    write_run(folder / "run", "dory")
    path = folder / "dory.index"
    done = run("build", *options(folder / "run", data, path, "model.layers.1-2"), "--answer-only")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def target(trained_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `loopsway serve --index`, and nothing more, answers for it."""
    with running_server([str(trained_index)], tmp_path_factory.mktemp("serve")) as port:
        yield f"127.0.0.1:{port}"


def options(folder: Path, data: Path, path: Path, loop: str) -> list[str | Path]:
    sketch = ["--width", "4096", "--bits", "32", "--batch-size", "4"]
    return ["--hf", folder, "--loop", loop, "--data", data, "--out", path, *sketch]


def exact_influences(task: Any, names: set[str]) -> torch.Tensor:
    """The slow oracle: sum_k eta_k <gradient of each example, gradient of the query>, by plain autograd."""
    influences = torch.zeros(len(ROWS))
    for checkpoint in task.checkpoints():
        model = task.model(checkpoint)
        parameters = [parameter for name, parameter in model.named_parameters() if name in names]
        gradients = []
        for example in [*task.examples(), task.example_from_json(QUERY)]:
            loss = task.losses(model, task.collate([example])).sum()
            gradients.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)]))
        influences += checkpoint.learning_rate * torch.stack(gradients[:-1]) @ gradients[-1]
    return influences


@pytest.mark.parametrize("kind", LOOPS)
def test_an_index_of_a_model_gives_the_influences_of_plain_autograd(tmp_path: Path, data: Path, kind: str) -> None:
    loop, num_steps = LOOPS[kind]
    folder = write_model(tmp_path / kind, kind)
    result = invoke(["build", *options(folder, data, tmp_path / "x.index", loop), "--learning-rate", "0.5"])
    assert result.exit_code == 0, result.output
    index = open_index(tmp_path / "x.index")
    assert (index.num_examples, index.num_steps) == (len(ROWS), num_steps)
    assert index.task_arguments == {
        "model": str(folder), "data": str(data), "loop": loop, "learning_rate": 0.5
    }  # fmt: skip
    assert index.task_spec is not None
    task = load_task(index.task_spec, index.task_arguments)
    sketcher = ExampleSketcher(task, index.config)
    sketch = sketcher.sketch([task.example_from_json(QUERY)]).values[0]
    total = index.search(sketch, k=len(ROWS)).total
    found = {
        example_id: (influence, error)
        for side in (total.proponents, total.opponents)
        for example_id, influence, error in zip(
            side.example_ids, side.influences, side.standard_errors, strict=True
        )
    }  # fmt: skip
    for row, expected in enumerate(exact_influences(task, set(sketcher.parameters)).tolist()):
        influence, error = found[str(row)]
        assert abs(influence - expected) < 5 * error, (kind, row, influence, expected, error)


def test_an_index_is_served_and_asked_with_no_more_arguments(trained_index: Path, target: str) -> None:
    with Client(target) as client:
        [answer] = client.find_influences([ExampleQuery(QUERY)], k=3)
        assert len(answer.steps) == 3
        assert len(answer.query.losses) == 2
        assert {influencer.metadata["num_tokens"] for influencer in answer.total.proponents} <= set(range(5, 20))
        # A token's own influence: the losses of the completion's tokens add up to its own.
        task = load_task("loopsway.tasks.causal_lm:CausalLMTask", open_index(trained_index).task_arguments)
        counted = task.example_from_json(QUERY).counted
        tokens = client.find_influences([ExampleQuery({**QUERY, "position": position}) for position in counted], k=1)
        mean = sum(token.query.losses[0] for token in tokens) / len(tokens)
        assert mean == pytest.approx(answer.query.losses[0], rel=1e-4)


def test_a_query_that_is_none_is_told_so(target: str) -> None:
    asked = invoke(["query", "--server", target, "--example", '{"prompt": "a"}'])
    assert asked.exit_code == 1
    assert '{"prompt": "...", "completion": "..."} or {"text": "..."}, one of the two' in asked.stderr


def test_inspect_shows_the_checkpoints_of_a_run(trained_index: Path) -> None:
    result = invoke(["inspect", trained_index])
    assert result.exit_code == 0, result.output
    for text in ("CausalLMTask", "checkpoint-2", "checkpoint-4", "0.0075", "0.0025"):
        assert text in result.stdout


@pytest.mark.parametrize("flags", [["--optimizer-aware"], ["--outside"], ["--all-tokens"]])
def test_a_flag_is_kept_with_the_index(trained_index: Path, data: Path, tmp_path: Path, flags: list[str]) -> None:
    folder = Path(open_index(trained_index).task_arguments["model"])
    path = tmp_path / "x.index"
    result = invoke(["build", *options(folder, data, path, "model.layers.1-2"), *flags])
    assert result.exit_code == 0, result.output
    index = open_index(path)
    assert index.config.optimizer_aware == (flags == ["--optimizer-aware"])
    assert index.loop.outside == (flags == ["--outside"])
    shown = invoke(["inspect", path]).stdout
    assert ("3, and what is before and after the loop" in shown) == index.loop.outside
    assert (re.search(r"^ *before +\d", shown, re.MULTILINE) is not None) == index.loop.outside
    assert index.task_arguments.get("answer_only", True) == (flags != ["--all-tokens"])


def test_several_folders_and_more_arguments_are_kept(model: Path, data: Path, tmp_path: Path) -> None:
    second = write_model(tmp_path / "second")
    more = ["--hf", second, "--learning-rate", "0.5,0.25", "--max-length", "32", "--task-arg", "reduction=sum"]
    path = tmp_path / "x.index"
    result = invoke(["build", *options(model, data, path, "model.layers.*"), *more])
    assert result.exit_code == 0, result.output
    index = open_index(path)
    assert index.task_arguments == {
        "model": [str(model), str(second)], "data": str(data), "loop": "model.layers.*",
        "learning_rate": "0.5,0.25", "max_length": 32, "reduction": "sum",
    }  # fmt: skip
    assert [checkpoint.learning_rate for checkpoint in index.checkpoints] == [0.5, 0.25]


def test_without_a_loop_the_model_s_lists_of_layers_are_told(model: Path, data: Path, tmp_path: Path) -> None:
    result = invoke(["build", "--hf", model, "--data", data, "--out", tmp_path / "x.index"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no loop was named: ")
    assert "model.layers (3 x LlamaDecoderLayer)" in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_transformers_the_extra_is_named(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = invoke(["build", *options(model, data, tmp_path / "x.index", "model.layers.*")])
    assert result.exit_code == 1
    assert result.stderr == "Error: a Hugging Face model needs transformers: pip install 'loopsway[hf]'\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "name what to index: either --task SPEC or --hf FOLDER"),
        (["--task", "parity", "--hf", "x"], "name what to index: either --task SPEC or --hf FOLDER"),
        (["--task", "parity", "--all-tokens", "--max-length", "8"], "--answer-only, --max-length: for --hf alone"),
        (["--hf", "x", "--loop", "a", "--task-arg", "loop=b"], "loop: given by --task-arg and by an option of its own"),
    ],
)
def test_a_task_is_named_once(tmp_path: Path, arguments: list[str], text: str) -> None:
    result = invoke(["build", "--out", tmp_path / "x.index", *arguments])
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.split())
