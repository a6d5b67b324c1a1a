"""A scan's limits hold: no row that it leaves out scores more, whatever the bits, the queries and the filter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from looped import Labelled, LoopedTask
from loopsway.indexer import SketchConfig, delete_examples, open_index
from loopsway.indexer.config import BITS
from loopsway.indexer.search import scan
from loopsway.indexer.search.filters import FilterError, matching_rows
from loopsway.indexer.search.products import TILE_QUERIES, exact_products
from loopsway.indexer.sketches.coding import decode, encode

from .conftest import answered, build

COUNT, BLOCK = 700, 64


def rows_of(bits: int, width: int, kept: np.ndarray | None = None) -> tuple[scan.Rows, np.ndarray]:
    """Coded rows of many sizes, a zero one among them, and what they decode to."""
    rng = np.random.default_rng(bits + width)
    sketches = rng.standard_normal((COUNT, width)) * np.exp(rng.standard_normal((COUNT, 1)))
    sketches[13] = 0
    codes = encode(torch.from_numpy(sketches.astype(np.float32)), bits)
    decoded = decode(codes.codes, codes.factors, bits)
    live = codes.factors > 0
    blocks = [range(start, min(start + BLOCK, COUNT)) for start in range(0, COUNT, BLOCK)]
    longest = (np.linalg.norm(decoded[live], axis=1) / codes.factors[live]).max()
    rows = scan.Rows(
        blocks=blocks,
        codes=lambda block: codes.codes[blocks[block].start : blocks[block].stop],
        factors=codes.factors,
        longest=float(longest),
        kept=kept,
    )
    return rows, decoded.astype(np.float64)


@pytest.mark.parametrize("waiting", [scan.WAITING, 100])
@pytest.mark.parametrize("share", [None, 0.9, 0.1, 0.0])
@pytest.mark.parametrize("width", [64, 1024])
@pytest.mark.parametrize("bits", BITS)
def test_no_row_that_is_left_out_scores_more_than_the_limit(
    bits: int, width: int, share: float | None, waiting: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "WAITING", waiting)
    rng = np.random.default_rng(1)
    kept = None if share is None else rng.random(COUNT) < share
    rows, decoded = rows_of(bits, width, kept)
    queries = rng.standard_normal((5, width)).astype(np.float32) * np.array([[1e-20], [1], [1e4], [1], [0]], np.float32)
    queries[3, 0] = 50  # its peak
    found = scan.scan(scan.code_queries(queries, bits), rows, 20)
    scores = queries.astype(np.float64) @ decoded.T
    for sign, candidates in zip((1, -1), found, strict=True):
        may = np.arange(COUNT) if kept is None else np.flatnonzero(kept)
        assert candidates.rows.shape == (5, min(20, len(may)))
        for query, (own, limit) in enumerate(zip(candidates.rows, candidates.limits, strict=True)):
            assert set(own) <= set(may)
            assert len(set(own)) == len(own)
            out = np.setdiff1d(may, own)
            assert (sign * scores[query, out] <= limit).all()
            if query in (1, 2):
                best = may[np.argsort(-sign * scores[query, may])[:5]]
                assert set(best) <= set(own), "twenty by their bounds hold the five best"


def test_limits_are_no_wider_than_they_need_be() -> None:
    """With sign bits of usual width a scan's first candidates suffice."""
    rows, decoded = rows_of(1, 4096)
    queries = np.random.default_rng(2).standard_normal((8, 4096)).astype(np.float32)
    largest, _ = scan.scan(scan.code_queries(queries, 1), rows, 18)
    tenth = -np.sort(-(queries @ decoded.T), axis=1)[:, 9]
    assert (tenth > largest.limits).mean() > 0.7


@pytest.mark.parametrize("bits", BITS)
def test_exact_products_are_those_of_float64(bits: int) -> None:
    rows, decoded = rows_of(bits, 1024)
    rng = np.random.default_rng(4)
    some = rng.standard_normal((TILE_QUERIES + 3, 1024))
    queries = np.concatenate([some, np.zeros((1, 1024)), 1e-20 * some[:2], np.eye(1024)[:3]]).astype(np.float32)
    products = exact_products(queries, bits)
    for block, own in enumerate(rows.blocks):
        scores = products(rows.codes(block)) * rows.factors[own.start : own.stop, None]
        want = decoded[own.start : own.stop] @ queries.T.astype(np.float64)
        scale = np.abs(decoded[own.start : own.stop]).max(1)[:, None] * np.abs(queries).sum(1)
        assert (np.abs(scores - want) <= 1e-6 * scale).all()


def test_equal_sign_codes_have_equal_products_whatever_is_beside_them() -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(256, size=(1500, 128), dtype=np.uint8)
    codes[1203] = codes[4]
    queries = rng.standard_normal((40, 1024)).astype(np.float32)
    products = exact_products(queries, 1)(codes)
    np.testing.assert_array_equal(products[1203], products[4])
    np.testing.assert_array_equal(exact_products(queries[7:8], 1)(codes[4:5])[0], products[4, 7:8])


def queries(count: int = 6) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, 4, 256)).astype(np.float32)


def test_an_answer_is_the_same_on_any_threads_and_in_any_batch(whole_index: Path) -> None:
    index, threads = open_index(whole_index), torch.get_num_threads()
    together = answered(index.search(queries(), k=7))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert answered(index.search(queries(), k=7)) == together
    finally:
        torch.set_num_threads(threads)
    assert answered([index.search(query, k=7) for query in queries()]) == together


def test_equal_scores_come_by_row(tmp_path: Path) -> None:
    task = LoopedTask(count=50)
    task._examples = [Labelled((1, 2, 3))] * 50
    index = build(tmp_path / "equal.index", task)
    for ranking in index.search(queries(), k=3):
        sides = [ids for ids, _ in answered([ranking]) if ids]
        assert sides
        assert all(side == ("train/0", "train/1", "train/2") for side in sides)


def test_a_zero_query_has_no_influence(whole_index: Path) -> None:
    ranking = open_index(whole_index).search(np.zeros((4, 256), np.float32), k=3)
    assert not any(ids for ids, _ in answered([ranking]))


def test_more_than_there_are_is_all_there_are(whole_index: Path) -> None:
    total = open_index(whole_index).search(queries(1)[0], k=1000).total
    assert len(total.proponents.rows) + len(total.opponents.rows) == 50
    alone = open_index(whole_index).search(queries(1)[0], k=1000, where='id == "train/7"').total
    assert total.proponents.example_ids[0] != total.opponents.example_ids[0]
    assert alone.proponents.example_ids + alone.opponents.example_ids == ("train/7",)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("where", ["length < 4", 'label != 1 and id != "train/3"', "length > 100"])
def test_a_filter_is_searched_within(copied: Path, where: str, exact: bool) -> None:
    delete_examples(copied, ids=["train/0", "train/9"])
    index = open_index(copied)
    matching = np.setdiff1d(np.flatnonzero(matching_rows(index.examples, where)), [0, 9])
    for query in queries():
        influences = index.trajectories(query, [f"train/{row}" for row in matching]).sum(2)[0]
        total = index.search(query, k=4, where=where, exact=exact).total
        for side, sign in ((total.proponents, 1), (total.opponents, -1)):
            order = np.lexsort((matching, -sign * influences))[:4]
            best = [row for row in order if sign * influences[row] > 0]
            np.testing.assert_allclose(side.influences, influences[best], rtol=1e-2, atol=1e-3)
            assert set(side.rows) <= set(matching)


def test_a_filter_that_can_not_be_read_says_where(whole_index: Path) -> None:
    with pytest.raises(FilterError, match=r"character 1: no column 'size'; the columns are id, description, length"):
        open_index(whole_index).search(queries(1)[0], where="size > 3")


@pytest.mark.parametrize("bits", [1, 8, 16])
def test_faiss_finds_what_a_scan_finds(tmp_path: Path, bits: int) -> None:
    index = build(tmp_path / "a.index", config=SketchConfig(width=256, bits=bits))
    assert answered(index.search(queries(), k=5, exact=False)) == answered(index.search(queries(), k=5))
