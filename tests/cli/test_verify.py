"""`loopsway verify`, and what else `loopsway build` says when something is wrong with the store or the data."""

from __future__ import annotations

import shutil
from pathlib import Path

from loopsway.indexer import open_index

from .conftest import invoke, run

NONFINITE = f"{Path(__file__).with_name('nonfinite_task.py')}:NonFiniteTask"


def test_verify_says_that_a_sound_index_is_sound(tiny_index: Path) -> None:
    result = invoke(["verify", tiny_index])
    assert result.exit_code == 0
    assert result.stdout == f"{tiny_index}: every piece is what its build wrote\n"


def test_verify_names_each_damaged_piece_on_a_line_and_fails(tiny_index: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny_index, tmp_path / "damaged.index"))
    cut, missing = next(path.rglob("total-00.faiss")), next(path.rglob("losses/c/0/0"))
    cut.write_bytes(cut.read_bytes()[:-1])
    missing.unlink()
    done = run("verify", path)
    assert done.returncode == 1
    size = cut.stat().st_size
    assert done.stdout.splitlines() == [f"{cut}: has {size:,} bytes, not {size + 1:,}", f"{missing}: is missing"]
    assert done.stderr.endswith(f"Error: {path} is damaged: 2 pieces are not what its build wrote; rebuild it\n")


def test_verify_needs_a_published_index(tmp_path: Path) -> None:
    result = invoke(["verify", tmp_path / "none.index"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: there is no index at {tmp_path / 'none.index'}")


def test_an_example_that_is_not_finite_stops_the_build_or_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "x.index"
    command = ["build", "--task", NONFINITE, "--out", path, "--width", "64"]
    stopped = invoke(command)
    assert stopped.exit_code == 1
    assert stopped.stderr.splitlines()[-1] == (
        "Error: the loss at checkpoint 'early' of example 'tiny-7' (row 7) is not finite; mend or leave out the "
        'example, or build with nonfinite="skip" (--nonfinite skip): what is done is kept'
    )
    skipped = invoke([*command, "--nonfinite", "skip"])
    assert skipped.exit_code == 0
    assert "skipped for want of a finite loss or gradient: 1 examples" in skipped.stderr
    assert open_index(path).skipped == {"tiny-7": "loss at checkpoint 'early' is not finite"}
    shown = invoke(["inspect", path])
    assert "48, of which 1 skipped" in shown.stdout
