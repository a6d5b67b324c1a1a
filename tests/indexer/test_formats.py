"""Indices that earlier versions wrote open for ever, and answer what they answered.

    python tests/indexer/test_formats.py    writes tests/indexer/formats/version-N.zip for this version of the format

A change of `FORMAT_VERSION` needs a new one; those that are there are never written again.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from looped import LoopedTask
from loopsway.indexer import (
    SketchConfig,
    add_examples,
    build_index,
    compact_index,
    delete_examples,
    open_index,
    verify_index,
)
from loopsway.indexer.building.examples import SubsetTask
from loopsway.indexer.store.manifest import FORMAT_VERSION

FORMATS = Path(__file__).with_name("formats")
NAMES = sorted(file.name for file in FORMATS.glob("*.zip"))
COUNT, FIRST, WIDTH = 40, 24, 64


def answers(path: Path) -> dict[str, Any]:
    """What an index says, as JSON."""
    index = open_index(path)
    queries = np.linspace(-1, 1, 3 * 4 * WIDTH, dtype=np.float32).reshape(3, 4, WIDTH) ** 3
    rankings = [index.search(query, k=5) for query in queries]
    return {
        "examples": [index.num_examples, index.num_rows, index.num_steps, index.generation],
        "proponents": [list(ranking.total.proponents.example_ids) for ranking in rankings],
        "influences": [ranking.total.proponents.influences.tolist() for ranking in rankings],
        "step 2": [list(ranking.steps[2].opponents.example_ids) for ranking in rankings],
        "description": index.example(7).description,
        "recall": index.recall["recall@10"],
    }


def test_this_version_has_an_index() -> None:
    assert f"version-{FORMAT_VERSION}.zip" in NAMES, "make it: python tests/indexer/test_formats.py"


@pytest.mark.parametrize("name", NAMES)
def test_an_index_of_an_earlier_version_answers_as_it_did(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(FORMATS / name) as file:
        file.extractall(tmp_path)
    path, then = tmp_path / "kept.index", json.loads((tmp_path / "answers.json").read_text())
    now = answers(path)
    np.testing.assert_allclose(now.pop("influences"), then.pop("influences"), rtol=1e-5)
    assert now == then
    assert verify_index(path, progress=False) == []
    noise = np.random.default_rng(0).standard_normal((4, WIDTH), np.float32)
    index = open_index(path)
    assert index.search(noise, exact=False).recall == min(min(each["by_slot"].values()) for each in index._recalls)
    assert open_index(path, generation=1).num_examples == FIRST
    arrays: Any = zarr.open(path / "generations/000001/arrays.zarr", mode="r")  # as the README shows
    np.testing.assert_array_equal(arrays["step_norms"][...], open_index(path).step_norms()[:, :FIRST])
    assert compact_index(path, progress=False).num_examples == COUNT - 2


def write(folder: Path) -> None:
    """Two parts, of which two examples are deleted, and what they answer."""
    path, task = folder / "kept.index", LoopedTask(count=COUNT)
    config = SketchConfig(width=WIDTH, bits=1)
    arguments: Any = {"block_rows": 16, "batch_size": 8, "progress": False}
    first, second = (SubsetTask(task, rows) for rows in (range(FIRST), range(FIRST, COUNT)))
    build_index(first, path, config, **arguments)
    add_examples(second, path, **arguments)
    delete_examples(path, ids=["train/3", "train/30"])
    (folder / "answers.json").write_text(json.dumps(answers(path), indent=1))


def main() -> None:
    target = FORMATS / f"version-{FORMAT_VERSION}.zip"
    assert not target.exists(), f"{target} is there, and is never written again"
    FORMATS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        write(Path(name))
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
            for each in sorted(Path(name).rglob("*")):
                if each.is_file() and each.name != "writer.lock":
                    file.write(each, each.relative_to(name))


if __name__ == "__main__":
    main()
