"""`loopsway query` against a real server in a process of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopsway.cli.answers import Resolve
from loopsway.indexer import ExampleSketcher, Ranked, load_task, open_index
from serving import QUERIES, TASK_SPEC

from .conftest import invoke

EXAMPLE = json.dumps(QUERIES[0])


@pytest.fixture(scope="module")
def sketches(tiny_index: Path) -> tuple[np.ndarray, str]:
    """Of the first query, [3, 256], and their fingerprint."""
    task = load_task(TASK_SPEC)
    sketcher = ExampleSketcher(task, open_index(tiny_index).config)
    return sketcher.sketch([task.example_from_json(QUERIES[0])]).values[0].numpy(), sketcher.fingerprint


def asked(target: str, *arguments: str) -> dict[str, Any]:
    result = invoke(["query", "--server", target, "--json", *arguments])
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def check_side(side: list[dict[str, Any]], expected: Ranked) -> None:
    assert [each["example_id"] for each in side] == list(expected.example_ids)
    np.testing.assert_allclose([each["influence"] for each in side], expected.influences, rtol=1e-4)
    np.testing.assert_allclose([each["standard_error"] for each in side], expected.standard_errors, rtol=1e-4)


def test_a_filter_is_searched_within(target: str, tiny_index: Path, sketches: tuple[np.ndarray, str]) -> None:
    document = asked(target, "--example", EXAMPLE, "--k", "3", "--where", "row < 6")
    expected = open_index(tiny_index).search(sketches[0], k=3, where="row < 6")
    check_side(document["total"]["proponents"], expected.total.proponents)
    refused = invoke(["query", "--server", target, "--example", EXAMPLE, "--where", "row <"])
    assert refused.exit_code == 1
    assert "invalid syntax" in refused.stderr


@pytest.mark.parametrize("resolve", ["query_step", "train_step", "same_step"])
def test_json_holds_what_the_index_itself_answers(
    target: str, tiny_index: Path, sketches: tuple[np.ndarray, str], resolve: Resolve
) -> None:
    document = asked(target, "--example", EXAMPLE, "--k", "4", "--resolve", resolve.replace("_", "-"))
    index = open_index(tiny_index)
    expected = index.search(sketches[0], k=4, resolve=resolve)
    assert document["resolve"] == resolve
    assert [ranking["step"] for ranking in document["steps"]] == [0, 1, 2]
    for shown, ranking in zip([document["total"], *document["steps"]], [expected.total, *expected.steps], strict=True):
        check_side(shown["proponents"], ranking.proponents)
        check_side(shown["opponents"], ranking.opponents)
    trajectories = document["trajectories"]
    ids = [*expected.total.proponents.example_ids, *expected.total.opponents.example_ids]
    assert trajectories["example_ids"] == ids
    for name, values in (("influences", index.trajectories), ("standard_errors", index.standard_errors)):
        np.testing.assert_allclose(trajectories[name], values(sketches[0], ids, resolve)[0], rtol=1e-3, atol=1e-6)


def test_an_example_by_id_and_a_sketch_of_it_get_the_same_answer(
    target: str, tmp_path: Path, sketches: tuple[np.ndarray, str]
) -> None:
    by_id = asked(target, "--id", "tiny-7")
    assert by_id["total"]["proponents"][0]["metadata"]["row"] >= 0
    np.save(tmp_path / "sketch.npy", sketches[0])
    by_sketch = asked(target, "--sketch", str(tmp_path / "sketch.npy"), "--fingerprint", sketches[1])
    by_example = asked(target, "--example", EXAMPLE)
    assert by_sketch["query"]["losses"] == []
    for one, other in zip(by_sketch["total"]["proponents"], by_example["total"]["proponents"], strict=True):
        assert one["example_id"] == other["example_id"]
        assert one["influence"] == pytest.approx(other["influence"], rel=1e-4)


def test_people_see_a_table_for_each_step_and_the_trajectories(target: str) -> None:
    result = invoke(["query", "--server", target, "--example", EXAMPLE, "--k", "3"])
    assert result.exit_code == 0, result.output
    top = asked(target, "--example", EXAMPLE, "--k", "3")["total"]["proponents"][0]
    for text in (EXAMPLE, "step 0", "step 1", "step 2", "the whole loop", "proponents", "opponents", "±"):
        assert text in result.stdout
    assert result.stdout.count(top["description"]) >= 2  # in the table, and beside its line in the chart
    assert "┤" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_only_the_steps_asked_for_are_ranked(target: str) -> None:
    document = asked(target, "--id", "tiny-0", "--step", "2", "--step", "0")
    assert [ranking["step"] for ranking in document["steps"]] == [0, 2]
    assert np.shape(document["trajectories"]["influences"])[1] == 3


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG\r\n"), ("new/b.svg", b"<?xml"), ("c.pdf", b"%PDF")])
def test_the_figure_is_of_the_format_that_its_name_says(target: str, tmp_path: Path, name: str, begins: bytes) -> None:
    path = tmp_path / name
    result = invoke(["query", "--server", target, "--id", "tiny-0", "--plot", path])
    assert result.exit_code == 0, result.output
    assert path.read_bytes().startswith(begins)
    assert result.stdout.endswith(f"figure: {path}\n")


def test_json_stays_alone_on_stdout_beside_a_figure(target: str, tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    result = invoke(["query", "--server", target, "--id", "tiny-0", "--json", "--plot", path])
    json.loads(result.stdout)
    assert result.stderr == f"figure: {path}\n"
    assert "total influence, training example" in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give one of --example JSON, --id ID or --sketch FILE.npy"),
        (["--id", "a", "--example", "{}"], "give one of"),
        (["--example", "{bits: 1}"], "is not JSON"),
        (["--id", "a", "--plot", "x.gif"], "has no known format"),
        (["--id", "a", "--resolve", "step-matrix"], "Invalid value for '--resolve'"),
        (["--sketch", __file__], "--sketch and --fingerprint go together"),
        (["--sketch", __file__, "--fingerprint", "ab"], "is not a .npy file"),
        (["--sketch", "none.npy", "--fingerprint", "ab"], "does not exist"),
    ],
)
def test_a_question_that_can_not_be_asked_is_a_usage_error(target: str, arguments: list[str], text: str) -> None:
    result = invoke(["query", "--server", target, *arguments])
    assert result.exit_code == 2
    assert text in " ".join(result.stderr.split())
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--id", "nobody"], "nobody"),
        (["--id", "tiny-0", "--index", "other"], "other"),
        (["--id", "tiny-0", "--k", "0"], "k"),
        (["--id", "tiny-0", "--step", "3"], "step"),
        (["--example", '{"tokens": [0]}'], "tokens"),
    ],
)
def test_what_the_server_refuses_is_one_line_and_no_traceback(target: str, arguments: list[str], text: str) -> None:
    result = invoke(["query", "--server", target, "--json", *arguments])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert text in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_sketch_of_another_construction_is_refused(
    target: str, tmp_path: Path, sketches: tuple[np.ndarray, str]
) -> None:
    np.save(tmp_path / "sketch.npy", sketches[0])
    arguments = ["--sketch", tmp_path / "sketch.npy", "--fingerprint", "0" * 32]
    result = invoke(["query", "--server", target, *arguments])
    assert result.exit_code == 1
    assert "fingerprint" in result.stderr


def test_a_server_that_is_not_there_is_one_line() -> None:
    result = invoke(["query", "--server", "127.0.0.1:1", "--id", "a"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: no Loopsway server answers at 127.0.0.1:1")
