"""An index that is missing, unfinished or damaged is refused when it is opened, or when the damaged part is read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from loopsway.indexer import IndexDamagedError, IndexNotFoundError, delete_examples, open_index


def test_there_is_no_index_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(IndexNotFoundError, match=r"there is no index at .*nothing; make one with `loopsway build"):
        open_index(tmp_path / "nothing")


def damage(file: Path, how: str) -> None:
    if how == "missing":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "how", "text"),
    [
        ("manifest.json", "cut", "manifest of index .* is damaged"),
        ("generations/*/examples.parquet", "missing", "examples.parquet is missing"),
        ("generations/*/examples.parquet", "cut", "examples.parquet has .* bytes"),
        ("generations/*/faiss/total-00.faiss", "cut", "total-00.faiss has .* bytes"),
        ("generations/*/faiss/step-0001-00.faiss", "missing", "step-0001-00.faiss is missing"),
        ("generations/*/rows.npy", "flipped", "rows.npy is damaged: it does not match its digest"),
        ("generations/*/arrays.zarr/losses/zarr.json", "missing", "zarr.json is missing"),
        ("generations/*/skipped.parquet", "cut", "skipped.parquet has .* bytes"),
    ],
)
def test_a_damaged_index_is_refused_when_opened(copied: Path, name: str, how: str, text: str) -> None:
    damage(next(copied.glob(name)), how)
    with pytest.raises(IndexDamagedError, match=text):
        open_index(copied)


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_missing_codes_are_found_when_they_are_read(copied: Path, how: str) -> None:
    index = open_index(copied)
    damage(next(copied.glob("generations/*/arrays.zarr/total_codes/c/1/0")), how)
    with pytest.raises(IndexDamagedError, match="is missing or cut short"):
        index.trajectories(np.ones((4, 256)), ["train/20"])


def test_a_table_with_a_changed_byte_is_found_when_it_is_read(copied: Path) -> None:
    delete_examples(copied, ids=["train/3"])
    for name in ("deleted", "skipped", "examples"):
        (table,) = copied.glob(f"generations/*/{name}.parquet")
        content = bytearray(table.read_bytes())
        content[len(content) // 3] ^= 1
        table.write_bytes(content)
        with pytest.raises(IndexDamagedError, match=rf"{name}\.parquet is damaged: it does not match its digest"):
            _ = open_index(copied).skipped if name == "skipped" else open_index(copied).examples
        content[len(content) // 3] ^= 1
        table.write_bytes(content)
    assert open_index(copied).num_examples == len(open_index(copied).examples) - 1


def test_another_format_version_is_refused(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(IndexDamagedError, match="has format version 99, this Loopsway reads 4"):
        open_index(copied)
