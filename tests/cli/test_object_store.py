"""The command on an index in an object store, built by a Ray cluster's workers and served from there."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import object_store
from loopsway.indexer import open_index
from serving import QUERIES, TASK_SPEC

from .conftest import run, served

OPTIONS = ["--width", "256", "--bits", "8", "--batch-size", "16"]


@pytest.fixture
def url(store_variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, value in (store_variables | {"LOOPSWAY_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    return f"s3://{object_store.BUCKET}/cli/{tmp_path.name}.index"


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; pip install 'loopsway[ray]'")
def test_an_index_is_built_by_workers_verified_and_served(url: str, tiny_index: Path, tmp_path: Path) -> None:
    built = run("build", "--task", TASK_SPEC, "--out", url, *OPTIONS, "--engine", "ray", "--workers", "2")
    assert built.returncode == 0, built.stderr
    assert built.stdout.startswith(f"{url}: 48 examples x 3 steps, ")
    assert run("verify", url).stdout == f"{url}: every piece is what its build wrote\n"
    assert json.loads(run("inspect", "--json", url).stdout)["path"] == url
    assert open_index(url).step_norms().tolist() == open_index(tiny_index).step_norms().tolist()
    example = json.dumps(QUERIES[0])
    answers = []
    for number, index in enumerate((url, tiny_index)):
        folder = tmp_path / str(number)
        folder.mkdir()
        with served(index, folder) as target:
            done = run("query", "--server", target, "--example", example, "--json")
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout))
    for key in ("total", "steps", "trajectories"):
        assert answers[0][key] == answers[1][key]


def test_what_can_not_be_reached_is_one_line(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("verify", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"Error: there is no index at {url}; make one with")
    done = run("build", "--task", TASK_SPEC, "--out", "s3://no-such-bucket/x.index", *OPTIONS)
    assert done.returncode == 1
    assert done.stderr == "Error: s3://no-such-bucket/x.index: the bucket does not exist; make it first\n"
