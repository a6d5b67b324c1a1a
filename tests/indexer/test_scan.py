"""A scan finds what a reading of every code in float64 finds, whatever the bits, rows, queries and filter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from looped import Labelled, LoopedTask
from loopsway.indexer import SketchConfig, delete_examples, open_index
from loopsway.indexer.config import BITS
from loopsway.indexer.search import coded_queries, scan, slot
from loopsway.indexer.search.filters import FilterError, matching_rows
from loopsway.indexer.search.products import ExactProducts
from loopsway.indexer.sketches.coding import decode, encode, row_bytes
from loopsway.indexer.sketches.rotation import rotate

from .conftest import answered, build

COUNT, BLOCK = 700, 64
PAIRS = {"PAIRED_QUERIES": 1000, "PAIRED_QUERY_BYTES": 1 << 30}
NO_PAIRS = {"PAIRED_QUERIES": 0}
SMALL = {"BATCH": 64, "TOO_MANY": 0, "ESTIMATES": 5000}  # several stretches; sign bits meet more planes


def coded(sketches: np.ndarray, bits: int, kept: np.ndarray | None = None) -> tuple[scan.Rows, np.ndarray]:
    """Coded rows, and what they decode to."""
    codes = encode(torch.from_numpy(sketches.astype(np.float32)), bits)
    decoded = decode(codes.codes, codes.factors, bits)
    live = codes.factors > 0
    blocks = [range(start, min(start + BLOCK, len(decoded))) for start in range(0, len(decoded), BLOCK)]
    longest = (np.linalg.norm(decoded[live].astype(np.float64), axis=1) / codes.factors[live]).max()
    rows = scan.Rows(
        blocks=blocks,
        codes=lambda block: codes.codes[blocks[block].start : blocks[block].stop],
        factors=codes.factors,
        longest=float(longest),
        row_bytes=codes.codes.shape[1] * codes.codes.itemsize,
        kept=kept,
    )
    return rows, decoded.astype(np.float64)


def rows_of(bits: int, width: int, kept: np.ndarray | None = None) -> tuple[scan.Rows, np.ndarray]:
    """Coded rows of many sizes, a zero one among them, and what they decode to."""
    rng = np.random.default_rng(bits + width)
    sketches = rng.standard_normal((COUNT, width)) * np.exp(rng.standard_normal((COUNT, 1)))
    sketches[13] = 0
    return coded(sketches, bits, kept)


def force(monkeypatch: pytest.MonkeyPatch, **constants: float) -> None:
    for name, value in constants.items():
        monkeypatch.setattr(scan if hasattr(scan, name) else coded_queries, name, value)


def scorer(scores: np.ndarray) -> scan.Score:
    """Gives scores [M, N] that are known."""
    return lambda whose, rows: scores[whose, rows]


def sides(answer: scan.Answer, k: int) -> list[tuple[list[int], list[float]]]:
    """The rows and scores of the k proponents and the k opponents, each the strongest first; equal ones by row."""
    found = []
    for sign in (1, -1):
        strongest = sorted((-sign * score, row) for row, score in zip(*map(np.ndarray.tolist, answer), strict=True))[:k]
        found.append(([row for score, row in strongest if score < 0], [-score for score, _ in strongest if score < 0]))
    return found


Arrange = Callable[[np.ndarray, np.ndarray, np.random.Generator], None]


def arranged(
    arrange: Arrange, rng: np.random.Generator, num_queries: int, width: int, num_rows: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rotated queries [M, W] and rows [N, W], of which `arrange` has made something harder than Gaussian noise."""
    queries, rows = rng.standard_normal((num_queries, width)), rng.standard_normal((num_rows, width))
    arrange(rows, queries, rng)
    first, second = (rotate(torch.from_numpy(each.astype(np.float32)), seed=0).numpy() for each in (queries, rows))
    return first, second


def random(rows: np.ndarray, queries: np.ndarray, _: np.random.Generator) -> None:
    queries[-1, 0] = 50  # its peak


def equal_rows(rows: np.ndarray, queries: np.ndarray, _: np.random.Generator) -> None:
    rows[len(rows) // 2 :][: len(rows) // 4] = rows[: len(rows) // 4]


def one_row(rows: np.ndarray, queries: np.ndarray, _: np.random.Generator) -> None:
    rows[3:] = rows[0]


def near_copies(rows: np.ndarray, queries: np.ndarray, _: np.random.Generator) -> None:
    rows[: len(rows) // 2] = queries[0] + 0.1 * rows[: len(rows) // 2]


def zeros(rows: np.ndarray, queries: np.ndarray, _: np.random.Generator) -> None:
    rows[::2] = 0
    queries[-1] = 0


def like_queries(rows: np.ndarray, queries: np.ndarray, rng: np.random.Generator) -> None:
    noise = rows * rng.uniform(0, 4, (len(rows), 1))
    rows[:] = queries[rng.integers(len(queries), size=len(rows))] * rng.choice([-1, 1], (len(rows), 1)) + noise


def huge_and_tiny(rows: np.ndarray, queries: np.ndarray, rng: np.random.Generator) -> None:
    rows *= 10.0 ** rng.uniform(-8, 8, (len(rows), 1))
    queries *= 1e-20


def subnormal_scores(rows: np.ndarray, queries: np.ndarray, rng: np.random.Generator) -> None:
    rows *= 10.0 ** rng.uniform(-9.2, -9, (len(rows), 1))  # most are equal to others
    queries *= 1e-36


ARRANGEMENTS = [random, equal_rows, one_row, near_copies, zeros, like_queries, huge_and_tiny, subnormal_scores]


@pytest.mark.parametrize(
    "constants", [{}, PAIRS, PAIRS | SMALL, NO_PAIRS | SMALL], ids=["usual", "pairs", "small-pairs", "small-no-pairs"]
)
@pytest.mark.parametrize("arrange", ARRANGEMENTS)
@pytest.mark.parametrize("bits", BITS)
def test_a_scan_finds_what_a_reading_of_all_finds(
    bits: int, arrange: Arrange, constants: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    force(monkeypatch, **constants)
    rng = np.random.default_rng([bits, ARRANGEMENTS.index(arrange)])
    for num_queries, width, num_rows in ((1, 1024, 5), (1, 64, 1500), (2, 128, 1500), (9, 256, 1500)):
        queries, sketches = arranged(arrange, rng, num_queries, width, num_rows)
        some = np.flatnonzero(rng.random(num_rows) < rng.choice([0.01, 0.1, 0.9]))
        rows, decoded = coded(sketches, bits)
        scores = queries.astype(np.float64) @ decoded.T
        for k, may in ((1, np.arange(num_rows)), (10, some), (500, np.arange(num_rows))):
            kept = None if len(may) == num_rows else np.isin(np.arange(num_rows), may)
            found = scan.scan(queries, bits, replace(rows, kept=kept), k, scorer(scores))
            for own, answer in zip(scores.astype(np.float32), found, strict=True):
                assert len(answer[0]) <= 2 * k
                assert sides(answer, k) == sides((may, own[may]), k)


@pytest.mark.parametrize("share", [0.9, 0.1, 0.02, 0.0])
@pytest.mark.parametrize("bits", BITS)
def test_blocks_of_which_nothing_may_be_found_are_not_read(bits: int, share: float) -> None:
    kept = np.random.default_rng(1).random(COUNT) < share
    kept[13] = True  # a row of zeros, which is not found either
    rows, decoded = rows_of(bits, 64, kept)
    queries, read = np.random.default_rng(2).standard_normal((3, 64)).astype(np.float32), []
    rows = replace(rows, codes=lambda block, codes=rows.codes: (read.append(block), codes(block))[1])
    found = scan.scan(queries, bits, rows, 5, scorer(queries @ decoded.T))
    kept[13] = False
    assert sorted(read) == [block for block, own in enumerate(rows.blocks) if kept[own.start : own.stop].any()]
    assert all(kept[row] for answer in found for row in answer[0])


@pytest.mark.parametrize("bits", BITS)
def test_few_rows_are_scored_exactly(bits: int) -> None:
    """With 4,096 coordinates, of 700 rows some 20 of each sign for a first floor, and few more."""
    rows, decoded = rows_of(bits, 4096)
    queries, scored = np.random.default_rng(2).standard_normal((8, 4096)).astype(np.float32), []
    known = scorer(queries @ decoded.T)

    def counted(whose: np.ndarray, rows: np.ndarray) -> np.ndarray:
        scored.append(len(rows))
        return known(whose, rows)

    scan.scan(queries, bits, rows, 5, counted)
    assert sum(scored) / len(queries) < 70


def test_stretches_hold_so_many_estimates() -> None:
    blocks = [range(start, start + 100) for start in range(0, 10_000, 100)]
    for num_queries in (1, 7, 64, 1 << 22):
        stretches = list(scan._stretches(blocks, num_queries))
        assert [block for stretch in stretches for block in stretch] == list(range(100))
        assert all(len(stretch) == 1 or 100 * len(stretch) * num_queries <= scan.ESTIMATES for stretch in stretches)


def test_a_scan_is_the_same_on_any_threads() -> None:
    rows, decoded = rows_of(1, 1024)
    queries, threads = np.random.default_rng(3).standard_normal((9, 1024)).astype(np.float32), torch.get_num_threads()
    scores, found = queries @ decoded.T, []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([sides(each, 7) for each in scan.scan(queries, 1, rows, 7, scorer(scores))])
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("bits", BITS)
def test_exact_products_are_those_of_float64(bits: int) -> None:
    rows, decoded = rows_of(bits, 1024)
    rng = np.random.default_rng(4)
    some = rng.standard_normal((35, 1024))
    queries = np.concatenate([some, np.zeros((1, 1024)), 1e-20 * some[:2], np.eye(1024)[:3]]).astype(np.float32)
    products = ExactProducts(queries, bits)
    for block, own in enumerate(rows.blocks):
        scores = products.of_all(rows.codes(block)) * rows.factors[own.start : own.stop, None]
        want = decoded[own.start : own.stop] @ queries.T.astype(np.float64)
        scale = np.abs(decoded[own.start : own.stop]).max(1)[:, None] * np.abs(queries).sum(1)
        assert (np.abs(scores - want) <= 1e-6 * scale).all()


def test_equal_sign_codes_have_equal_products_whatever_is_beside_them() -> None:
    rng = np.random.default_rng(5)
    codes = rng.integers(256, size=(1500, 128), dtype=np.uint8)
    codes[1203] = codes[4]
    queries = rng.standard_normal((40, 1024)).astype(np.float32)
    products = ExactProducts(queries, 1).of_all(codes)
    np.testing.assert_array_equal(products[1203], products[4])
    np.testing.assert_array_equal(ExactProducts(queries[7:8], 1).of_all(codes[4:5])[0], products[4, 7:8])


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


def test_rows_that_are_scored_in_parts_have_the_same_scores(whole_index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(whole_index)
    together = answered(index.search(queries(), k=7))
    monkeypatch.setattr(slot, "SCORED_BYTES", 3 * row_bytes(256, index.bits))
    assert answered(index.search(queries(), k=7)) == together


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
