"""`loopsway build --engine ray` and `loopsway serve --engine ray`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from loopsway.indexer import open_index, verify_index
from serving import TASK_SPEC

from .conftest import invoke, run, served


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; pip install 'loopsway[ray]'")
def test_two_workers_build_what_one_process_does(tiny_index: Path, tmp_path: Path) -> None:
    path = tmp_path / "ray.index"
    options = ["--width", "256", "--bits", "8", "--batch-size", "16", "--engine", "ray", "--workers", "2"]
    done = run("build", "--task", TASK_SPEC, "--out", path, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path}: 48 examples x 3 steps, ")
    assert "sketching examples, 2 workers" in done.stderr
    assert open_index(path).step_norms().tolist() == open_index(tiny_index).step_norms().tolist()
    assert verify_index(path, progress=False) == []


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; pip install 'loopsway[ray]'")
def test_actors_serve_what_one_process_does(tiny_index: Path, target: str, tmp_path: Path) -> None:
    asked = ["query", "--id", "tiny-3", "--json", "--server"]
    with served(tiny_index, tmp_path, "--engine", "ray", "--workers", "1") as sharded:
        got, want = (run(*asked, at) for at in (sharded, target))
    assert got.returncode == 0, got.stderr
    assert json.loads(got.stdout) == json.loads(want.stdout)
    assert json.loads(got.stdout)["coverage"] == 1


def test_workers_without_an_engine_for_them_are_refused(tiny_index: Path) -> None:
    result = invoke(["serve", "--index", tiny_index, "--no-model", "--workers", "2"])
    assert result.exit_code == 1
    assert 'give engine "ray" too' in result.stderr
