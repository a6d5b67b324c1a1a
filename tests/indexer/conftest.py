"""An index of fifty examples in four blocks, built once, and copies of it to damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cutting import BATCH_SIZE, BLOCK_ROWS, CONFIG, COUNT
from looped import LoopedTask
from loopsway.indexer import Index, Ranking, SketchConfig, Task, build_index


def build(path: Path, task: Task | None = None, config: SketchConfig = CONFIG, **arguments: Any) -> Index:
    arguments = {"block_rows": BLOCK_ROWS, "batch_size": BATCH_SIZE, "progress": False, **arguments}
    return build_index(task or LoopedTask(count=COUNT), path, config, **arguments)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of the arrays, and the examples."""
    files = [*path.rglob("arrays.zarr/**/*"), *path.rglob("*.parquet")]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files if file.is_file()}


def answered(rankings: list[Ranking]) -> list[tuple[tuple[str, ...], list[float]]]:
    """Ids and influences of every side: the total's and each step's, query after query."""
    return [
        (side.example_ids, side.influences.tolist())
        for ranking in rankings
        for at in (ranking.total, *ranking.steps)
        for side in (at.proponents, at.opponents)
    ]


def assert_same(got: dict[str, bytes], want: dict[str, bytes]) -> None:
    """Says which files differ, and by how much: whole contents fill pages."""
    differing = {
        name: (len(mine), len(others), sum(a != b for a, b in zip(mine, others, strict=False)))
        for name in sorted(got.keys() & want.keys())
        if (mine := got[name]) != (others := want[name])
    }
    assert (differing, sorted(got.keys() ^ want.keys())) == ({}, []), "sizes and differing bytes; files of one alone"


@pytest.fixture(scope="session")
def whole_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("build") / "whole.index"
    build(path)
    return path


@pytest.fixture
def copied(whole_index: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_index, tmp_path / "copy.index"))
