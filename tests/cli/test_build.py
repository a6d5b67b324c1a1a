"""`loopsway build` and `loopsway inspect`."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import looped
from loopsway.cli.inspection import show_plan
from loopsway.indexer import Approximation, open_index
from serving import TASK_SPEC

from .conftest import invoke, run

INTERRUPTED = f"{Path(__file__).with_name('interrupted_task.py')}:InterruptedTask"


def test_build_makes_the_index_that_its_options_describe(tiny_index: Path) -> None:
    index = open_index(tiny_index)
    assert (index.num_examples, index.num_steps, index.width, index.bits) == (48, 3, 256, 8)
    assert index.task_spec == TASK_SPEC


def test_a_finished_index_is_left_as_it_is(tiny_index: Path) -> None:
    created = open_index(tiny_index).created_at
    options = ["--width", "256", "--bits", "8", "--batch-size", "16"]
    result = invoke(["build", "--task", TASK_SPEC, "--out", tiny_index, *options])
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{tiny_index}: 48 examples x 3 steps, ")
    assert open_index(tiny_index).created_at == created


def test_another_configuration_for_the_same_path_is_refused_in_one_line(tiny_index: Path) -> None:
    result = invoke(["build", "--task", TASK_SPEC, "--out", tiny_index, "--width", "512"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tiny_index} already holds an index of something else")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--width", "100"], "width is 100, expected a power of two"),
        (["--bits", "3"], "bits is 3, expected one of 1, 2, 4"),
        (["--task-arg", "learning_rate"], "is not KEY=VALUE"),
        (["--batch-size", "0"], "0 is not in the range x>=1"),
        (["--workers", "2", "--address", "auto"], "--workers, --address: for --engine ray alone"),
    ],
)
def test_a_wrong_option_is_a_usage_error(tmp_path: Path, options: list[str], text: str) -> None:
    result = invoke(["build", "--task", TASK_SPEC, "--out", tmp_path / "x.index", *options])
    assert result.exit_code == 2
    assert text in result.stderr


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("missing.py:Task", "task file missing.py does not exist"),
        ("nonsense", "names no class"),
        ("json:JSONDecoder", "has no class JSONDecoder that derives from"),
    ],
)
def test_a_task_that_can_not_be_loaded_fails_in_one_line(tmp_path: Path, task: str, text: str) -> None:
    result = invoke(["build", "--task", task, "--out", tmp_path / "x.index"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert text in result.stderr


def test_task_arguments_are_json_where_they_can_be(tmp_path: Path) -> None:
    options = ["--task-arg", "learning_rate=0.25", "--width", "64", "--bits", "8"]
    result = invoke(["build", "--task", TASK_SPEC, "--out", tmp_path / "x.index", *options])
    assert result.exit_code == 0
    index = open_index(tmp_path / "x.index")
    assert index.task_arguments == {"learning_rate": 0.25}
    assert index.checkpoints[0].learning_rate == 0.25


def test_an_index_that_finds_too_little_is_refused_in_one_line_and_built_with_another_factory(tmp_path: Path) -> None:
    path, options = tmp_path / "x.index", ["--width", "256", "--recall-queries", tmp_path / "queries.npy"]
    np.save(tmp_path / "queries.npy", np.random.default_rng(0).standard_normal((4, 3, 256), np.float32))
    command = ["build", "--task", f"{looped.__file__}:LoopedTask", "--task-arg", "count=200", "--out", path, *options]
    refused = invoke([*command, "--faiss", "IVF1,PQ1x1"])
    assert refused.exit_code == 1
    line = refused.stderr.splitlines()[-1]  # after the bars
    assert line.startswith("Error: FAISS factory 'IVF1,PQ1x1' finds 0.")
    assert "run the same command with a finer factory (--faiss 'SQ8', or none) or a lower --recall-floor" in line
    assert invoke([*command, "--faiss", "IVF4,SQ8", "--recall-floor", "0.98"]).exit_code == 0
    index = open_index(path)
    assert index.approximation == Approximation(factory="IVF4,SQ8", recall_floor=0.98)
    assert set(index.recall["given"]) == {"0", "1", "2", "3", "total"}
    assert "at any step; IVF4,SQ8, effort up to" in " ".join(invoke(["inspect", path]).stdout.split())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--faiss", "nonsense"], "by factory 'nonsense'"),
        (["--recall-floor", "2"], "recall_floor is 2.0, expected a share"),
        (["--recall-queries", __file__], "test_build.py can't be read as sketches: "),
    ],
)
def test_what_approximate_search_can_not_use_fails_in_one_line(tmp_path: Path, options: list[str], text: str) -> None:
    result = invoke(["build", "--task", TASK_SPEC, "--out", tmp_path / "x.index", "--width", "256", *options])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_interrupted_build_says_how_to_go_on_and_the_same_command_does(tmp_path: Path) -> None:
    path = tmp_path / "x.index"
    task = ["--task", INTERRUPTED, "--task-arg", f"marker={tmp_path / 'marker'}"]
    command = ["build", *task, "--out", str(path), "--width", "256", "--batch-size", "16"]
    cut = run(*command)
    assert cut.returncode == 130
    last = f"stopped as asked: 48 of 48 examples are stored in {path}; run the same command to go on\n"
    assert cut.stderr.endswith(last)
    assert "stopping after this block; once more to stop at once and lose the block" in cut.stderr
    unfinished = invoke(["inspect", path])
    assert unfinished.exit_code == 1
    assert "is unfinished" in unfinished.stderr
    assert run(*command).returncode == 0
    assert open_index(path).num_examples == 48


def test_inspect_shows_what_the_index_holds(tiny_index: Path) -> None:
    result = invoke(["inspect", tiny_index])
    assert result.exit_code == 0, result.output
    index = open_index(tiny_index)
    for text in (str(tiny_index), "48", "width 256, 8 bits", "body block", "early", "late", "recall@10", "█"):
        assert text in result.stdout
    assert index.fingerprint in result.stdout


def test_inspect_gives_one_json_document(tiny_index: Path) -> None:
    result = invoke(["inspect", tiny_index, "--json"])
    document = json.loads(result.stdout)
    index = open_index(tiny_index)
    assert document["examples"] == 48
    assert document["fingerprint"] == index.fingerprint
    assert document["size_bytes"] == index.size_bytes
    assert [step["step"] for step in document["step_norms"]] == [0, 1, 2]
    assert sum(step["share"] for step in document["step_norms"]) == pytest.approx(1, abs=1e-5)
    assert [checkpoint["learning_rate"] for checkpoint in document["checkpoints"]] == [0.1, 0.05]


def test_inspect_gives_the_plan_that_the_build_kept(tiny_index: Path) -> None:
    plan = json.loads(invoke(["inspect", tiny_index, "--json"]).stdout)["plan"]
    assert isinstance(plan, list)
    result = invoke(["inspect", tiny_index, "--plan"])
    assert result.exit_code == 0, result.output
    for text in [entry["parameter"] for entry in plan] or ["keeps no plan"]:
        assert text in result.stdout


def test_a_plan_is_a_table_with_a_line_for_each_parameter() -> None:
    known = {"parameter": "block.0.weight", "shape": [8, 16], "path": "product", "uses": 3}
    timed = {**known, "expected_ms": 1.25, "measured_ms": 1.5, "note": "[as planned]"}
    console = Console(file=io.StringIO(), width=120)
    show_plan(
        {"path": "x.index", "plan": [timed, {**known, "expected_ms": 2, "measured_ms": None, "note": ""}]}, console
    )
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    assert re.fullmatch(r"block\.0\.weight +8 x 16 +product +3 +1\.25 +1\.5 +\[as planned\] *", lines[1])
    assert re.fullmatch(r"block\.0\.weight +8 x 16 +product +3 +2 *", lines[2])


def test_inspect_names_what_is_missing_or_damaged_in_one_line(tiny_index: Path, tmp_path: Path) -> None:
    absent = invoke(["inspect", tmp_path / "none.index"])
    assert absent.exit_code == 1
    assert absent.stderr.startswith(f"Error: there is no index at {tmp_path / 'none.index'}")
    damaged = tmp_path / "damaged.index"
    shutil.copytree(tiny_index, damaged)
    (damaged / "manifest.json").write_text("{")
    result = invoke(["inspect", damaged])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: the manifest of index {damaged} is damaged")
