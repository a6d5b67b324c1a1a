"""`loopsway serve`: what it refuses, before it listens. That it serves is shown by every test of the query."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from loopsway.indexer import delete_examples, open_index
from serving import TASK_SPEC

from .conftest import invoke, run


def test_a_task_that_is_not_shipped_does_not_run_unasked(tiny_index: Path) -> None:
    result = invoke(["serve", "--index", tiny_index, "--port", "0"])
    assert result.exit_code == 1
    assert f"with --task {TASK_SPEC}" in result.stderr


def test_an_index_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    result = invoke(["serve", "--index", tmp_path / "none.index"])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: there is no index at")


@pytest.mark.parametrize("options", [[], ["--index", "x", "--port", "70000"], ["--index", "x", "--port", "some"]])
def test_a_wrong_option_is_a_usage_error(options: list[str]) -> None:
    result = invoke(["serve", *options])
    assert result.exit_code == 2
    assert "Usage: loopsway serve" in result.stderr


def test_an_address_that_others_reach_is_refused(tiny_index: Path) -> None:
    done = run("serve", "--index", tiny_index, "--no-model", "--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("Error: host 0.0.0.0 is not loopback")


def test_a_taken_port_is_one_line(tiny_index: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("serve", "--index", tiny_index, "--no-model", "--port", str(taken.getsockname()[1]))
    assert done.returncode == 1
    assert "Error: can't listen on 127.0.0.1:" in done.stderr


def test_the_settings_can_be_checked_without_serving(tiny_index: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(f"indices = ['{tiny_index}']\nport = 0\n")
    result = invoke(["serve", "--config", file, "--check-config"])
    assert result.exit_code == 2
    assert "its code only runs when you name it" in result.stderr
    file.write_text(f"indices = [{{ path = '{tiny_index}', model = false }}]\nport = 0\n")
    result = invoke(["serve", "--config", file, "--check-config"])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "the settings are good")
    grown = shutil.copytree(tiny_index, tmp_path / "grown.index")
    delete_examples(grown, ids=[open_index(grown).example(0).id])
    next(grown.rglob("*deleted*.parquet")).unlink()
    file.write_text(f"indices = [{{ path = '{grown}', model = false }}]\n")
    result = invoke(["serve", "--config", file, "--check-config"])
    *_, served, refused, _ = result.stdout.splitlines()
    assert (result.exit_code, "generation 1," in served) == (0, True)
    assert refused.startswith(f"index grown: its last generation would be refused: index {grown} is damaged")
    file.write_text(f"indices = ['{tmp_path / 'none.index'}']\n")
    result = invoke(["serve", "--config", file, "--check-config"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: there is no index at")
    file.write_text("porrt = 1\n")
    result = invoke(["serve", "--config", file, "--check-config"])
    assert result.exit_code == 2
    assert "porrt is no setting" in result.stderr
    assert invoke(["serve", "--config", tmp_path / "none.toml"]).exit_code == 2
