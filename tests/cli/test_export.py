"""`loopsway export`."""

from __future__ import annotations

from pathlib import Path

from .conftest import invoke


def test_an_index_is_exported_in_either_format(tiny_index: Path, tmp_path: Path) -> None:
    for kind in ("parquet", "safetensors"):
        out, name = tmp_path / kind, f"sketches-00000.{kind}"
        done = invoke(["export", tiny_index, "--out", out, "--format", kind])
        assert done.exit_code == 0, done.output
        assert done.stdout == f"{out}: examples.parquet and 1 files of sketches, {name} to {name}\n"
        assert {file.name for file in out.iterdir()} == {"export.json", "examples.parquet", name}


def test_what_is_in_the_way_is_named(tiny_index: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    done = invoke(["export", tiny_index, "--out", tmp_path])
    assert done.exit_code == 1
    assert done.stderr == f"Error: {tmp_path} holds something else, mine.txt for one; name an empty folder\n"
