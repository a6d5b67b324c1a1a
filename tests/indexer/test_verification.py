"""`verify_index` finds every damaged piece, whatever it is and however it came to be."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from loopsway.indexer import IndexNotFoundError, verify_index

KINDS = {
    "the manifest": "manifest.json",
    "the history": "manifests/000001.json",
    "the plan": "generations/*/plan.json",
    "a block's entry": "generations/*/blocks/000001.json",
    "the examples": "generations/*/examples.parquet",
    "the skipped examples": "generations/*/skipped.parquet",
    "what recall was measured": "generations/*/recall.json",
    "the row table": "generations/*/rows.npy",
    "a step's FAISS index": "generations/*/faiss/step-0002-00.faiss",
    "the total's FAISS index": "generations/*/faiss/total-00.faiss",
    "the arrays' description": "generations/*/arrays.zarr/zarr.json",
    "an array's description": "generations/*/arrays.zarr/step_codes/zarr.json",
    "codes of a step": "generations/*/arrays.zarr/step_codes/c/3/1/0",
    "codes of the total": "generations/*/arrays.zarr/total_codes/c/3/0",  # the last block, which is not full
    "factors of the steps": "generations/*/arrays.zarr/step_factors/c/0/1",
    "norms of the steps": "generations/*/arrays.zarr/step_norms/c/0/3",
    "factors of the total": "generations/*/arrays.zarr/total_factors/c/0",
    "norms of the total": "generations/*/arrays.zarr/total_norms/c/2",
    "losses": "generations/*/arrays.zarr/losses/c/0/3",
}


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def test_a_sound_index_has_no_damage(whole_index: Path) -> None:
    assert verify_index(whole_index, progress=False) == []


def test_every_kind_of_file_is_tried(whole_index: Path) -> None:
    """A file of a kind that is not above would go unseen by the tests below."""

    def kind(file: Path) -> str:
        return re.sub(r"\d+", "#", file.as_posix())

    tried = {kind(file.relative_to(whole_index)) for pattern in KINDS.values() for file in whole_index.glob(pattern)}
    files = {kind(file.relative_to(whole_index)) for file in whole_index.rglob("*") if file.is_file()}
    arrays = {name for name in files if name.endswith("zarr.json")}
    assert files - arrays - {"writer.lock"} == tried - arrays


@pytest.mark.parametrize("kind", KINDS)
def test_one_flipped_bit_is_found_and_the_piece_named(copied: Path, kind: str) -> None:
    file = next(copied.glob(KINDS[kind]))
    size, draw = 8 * file.stat().st_size, random.Random(kind)
    for bit in (0, size - 1, *(draw.randrange(size) for _ in range(4))):
        flip(file, bit)
        damages = verify_index(copied, progress=False)
        assert str(file) in {damage.file for damage in damages}, f"bit {bit} of {size} goes unseen"
        assert all(damage.problem for damage in damages)
        flip(file, bit)
    assert verify_index(copied, progress=False) == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "the manifest"])
@pytest.mark.parametrize("how", ["cut", "empty", "missing"])
def test_a_file_that_is_cut_short_or_missing_is_found(copied: Path, kind: str, how: str) -> None:
    file = next(copied.glob(KINDS[kind]))
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(b"" if how == "empty" else file.read_bytes()[:-1])
    damages = {damage.file: damage.problem for damage in verify_index(copied, progress=False)}
    assert str(file) in damages
    if how == "missing":
        assert "is missing" in damages[str(file)]


def test_several_damaged_pieces_are_all_named(copied: Path) -> None:
    files = [next(copied.glob(KINDS[kind])) for kind in ("codes of a step", "the examples", "losses")]
    for file in files:
        flip(file, 40)
    assert {damage.file for damage in verify_index(copied, progress=False)} == set(map(str, files))


def test_there_is_nothing_to_verify_before_an_index_is_published(copied: Path, tmp_path: Path) -> None:
    (copied / "manifest.json").unlink()
    for path in (copied, tmp_path / "none.index"):
        with pytest.raises(IndexNotFoundError):
            verify_index(path, progress=False)
