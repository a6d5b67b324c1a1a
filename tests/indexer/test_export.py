"""What other tools read of an index: an export's sketches give the influences that a search gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open

from cutting import COUNT
from loopsway.indexer import Index, SketchConfig, delete_examples, export_index, open_index
from loopsway.indexer.building import export
from loopsway.indexer.sketches.rotation import rotate, rotate_back

from .conftest import build


@pytest.fixture
def index(copied: Path) -> Index:
    delete_examples(copied, ids=["train/3"])
    return open_index(copied)


def query(index: Index) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, index.width)).astype(np.float32)


def read_parquet(out: Path, names: tuple[str, ...]) -> dict[tuple[str, int | None], tuple[np.ndarray, float]]:
    rows = [row for name in names for row in pyarrow.parquet.read_table(out / name).to_pylist()]
    return {(row["id"], row["step"]): (np.array(row["sketch"], np.float32), row["norm"]) for row in rows}


def read_safetensors(out: Path, names: tuple[str, ...]) -> dict[tuple[str, int | None], tuple[np.ndarray, float]]:
    found: dict[tuple[str, int | None], tuple[np.ndarray, float]] = {}
    for name in names:
        with safe_open(out / name, framework="numpy") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            ids = json.loads(file.metadata()["ids"])
        for row, example_id in enumerate(ids):
            for step, values in enumerate(tensors["steps"][row]):
                found[example_id, step] = values, float(tensors["step_norms"][row, step])
            found[example_id, None] = tensors["total"][row], float(tensors["total_norms"][row])
    return found


READERS: Any = {"parquet": read_parquet, "safetensors": read_safetensors}


@pytest.mark.parametrize("format", READERS)
def test_exported_sketches_give_the_influences_of_the_index(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: Any
) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 4 * 256 * 5 * 20)  # twenty examples
    out, sketches = tmp_path / "out", query(index)
    names = export_index(index.path, out, format=format, progress=False)
    assert names == tuple(f"sketches-0000{shard}.{format}" for shard in range(3))
    found = READERS[format](out, names)
    ids = [f"train/{row}" for row in range(COUNT) if row != 3]
    assert pyarrow.parquet.read_table(out / "examples.parquet")["id"].to_pylist() == ids
    assert list(found) == [(example_id, step) for example_id in ids for step in (0, 1, 2, 3, None)]
    influences = np.array([[found[example_id, None][0] @ step for step in sketches] for example_id in ids])
    np.testing.assert_allclose(influences, index.trajectories(sketches, ids)[0], rtol=1e-4, atol=1e-6)
    by_step = np.array([[found[each, step][0] @ sketches.sum(0) for step in range(4)] for each in ids])
    np.testing.assert_allclose(by_step, index.trajectories(sketches, ids, "train_step")[0], rtol=1e-4, atol=1e-6)
    rows = [index.row_of(example_id) for example_id in ids]
    np.testing.assert_array_equal([found[each, None][1] for each in ids], index.total_norms()[rows])


def test_rotating_back_undoes_the_rotation() -> None:
    for width in (64, 256, 32768):
        sketches = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(rotate_back(rotate(sketches, 5), 5), sketches)


def test_exported_float32_sketches_are_those_that_were_made(tmp_path: Path) -> None:
    index = build(tmp_path / "exact.index", config=SketchConfig(width=256, bits=32))
    rows = np.array([4, 0, 49])
    stored = index.sketches(rows)
    np.testing.assert_allclose(stored[:, :-1].sum(1), stored[:, -1], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(stored[:, -1], axis=1), index.total_norms()[rows], rtol=1e-5)


def test_an_export_that_was_cut_goes_on_and_another_is_refused(
    index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHARD_BYTES", 4 * 256 * 5 * 20)
    out = tmp_path / "out"
    names = export_index(index.path, out, progress=False)
    whole = {name: (out / name).read_bytes() for name in names}
    (out / names[1]).unlink()
    kept = (out / names[0]).stat().st_mtime_ns
    assert export_index(index.path, out, progress=False) == names
    assert {name: (out / name).read_bytes() for name in names} == whole
    assert (out / names[0]).stat().st_mtime_ns == kept, "what was there is not written again"
    with pytest.raises(FileExistsError, match="holds the output of another job"):
        export_index(index.path, out, format="safetensors", progress=False)
    with pytest.raises(FileExistsError, match=r"holds something else, .* for one; name an empty folder"):
        export_index(index.path, index.path, progress=False)
    with pytest.raises(ValueError, match="format is 'csv', expected one of parquet, safetensors"):
        export_index(index.path, tmp_path / "b", format="csv", progress=False)  # pyright: ignore[reportArgumentType]
