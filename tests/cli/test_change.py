"""`loopsway add`, `delete`, `compact` and `prune`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loopsway.indexer import open_index
from serving import TASK_SPEC

from .conftest import invoke

OTHER_HALF = f"{Path(__file__).with_name('half_task.py')}:HalfTask"
SKETCHING = ["--batch-size", "16"]


@pytest.fixture
def copied(tiny_index: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_index, tmp_path / "copy.index"))


def test_an_index_through_its_life(tmp_path: Path) -> None:
    path = tmp_path / "life.index"
    half = ["--task", OTHER_HALF, "--task-arg", "half=0"]
    assert invoke(["build", *half, "--out", path, "--width", "64", *SKETCHING]).exit_code == 0
    whole = ["--task", OTHER_HALF]
    refused = invoke(["add", path, *whole, *SKETCHING])
    assert refused.exit_code == 1
    assert "24 of 48 examples are in index life already, 'tiny-0' for one" in refused.stderr
    added = invoke(["add", path, *whole, "--skip-existing", *SKETCHING])
    assert added.exit_code == 0, added.stderr
    assert added.stdout.startswith(f"{path}: 48 examples x 3 steps, ")
    deleted = invoke(["delete", path, "--where", "even and row >= 40"])
    assert deleted.stdout == f"{path}: deleted 4 examples\n"
    ids = tmp_path / "ids"
    ids.write_text("tiny-1\ntiny-3\n")
    assert invoke(["delete", path, "--ids-file", ids]).stdout == f"{path}: deleted 2 examples\n"
    assert invoke(["delete", path, "--ids", "tiny-5"]).stdout == f"{path}: deleted 1 examples\n"
    assert invoke(["compact", path]).stdout.startswith(f"{path}: 41 examples x 3 steps, ")
    pruned = invoke(["prune", path])
    assert pruned.stdout.startswith(f"{path}: removed generations 1, 2, 3, 4, 5; 5 parts, ")
    assert invoke(["verify", path]).exit_code == 0
    index = open_index(path)
    assert (index.num_examples, index.num_rows, index.generation) == (41, 41, 6)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ([], 2, "name the examples by one of --ids, --ids-file and --where"),
        (["--ids", "a", "--where", "row < 3"], 2, "name the examples by one of"),
        (["--ids", "nobody"], 1, "Error: example 'nobody' is not among the 48 of index copy"),
        (["--where", "rwo < 3"], 1, "no column 'rwo'"),
        (["--where", "row >= 0"], 1, "that would delete all 48 examples"),
    ],
)
def test_a_deletion_that_can_not_be_is_refused_in_one_line(
    copied: Path, arguments: list[str], code: int, text: str
) -> None:
    result = invoke(["delete", copied, *arguments])
    assert result.exit_code == code
    assert text in result.stderr
    assert open_index(copied).num_examples == 48


@pytest.mark.parametrize("command", ["add", "delete", "compact", "prune"])
def test_there_must_be_an_index(tmp_path: Path, command: str) -> None:
    options = {"add": ["--task", TASK_SPEC], "delete": ["--ids", "a"]}.get(command, [])
    result = invoke([command, tmp_path / "none.index", *options])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: there is no index at {tmp_path / 'none.index'}")
