"""A search on a device gives the answers of one on the processor, whatever of its codes the device holds.

Torch's "cpu" is a device like any other here, given to `DeviceScan` directly: `open_index` takes scan.py for it.
"""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutting import BLOCK_ROWS
from looped import Labelled, LoopedTask
from loopsway.indexer import Index, SketchConfig, add_examples, delete_examples, open_index
from loopsway.indexer.building.examples import SubsetTask
from loopsway.indexer.config import BITS
from loopsway.indexer.search import device_scan
from loopsway.indexer.search.device_scan import DeviceScan, looked_up
from loopsway.indexer.search.filters import matching_rows
from loopsway.indexer.search.ranking import TOTAL, Pair, pairs
from loopsway.indexer.search.scan import Rows
from loopsway.indexer.sketches.coding import row_bytes

from .conftest import answered, build
from .test_scan import ARRANGEMENTS, COUNT, Arrange, arranged, coded, rows_of, scorer, sides

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
RESOLVES = ("query_step", "train_step", "same_step")
AMPLE = 1 << 30  # bytes
WIDTH, STEPS, PARTS = 256, 4, (range(27), range(27, 50))  # the first is not a whole number of blocks


class CountedRows:
    """Rows, and how many of their blocks were read."""

    def __init__(self, rows: Rows) -> None:
        self.num_read = 0
        self.rows = replace(rows, codes=lambda block: self._read(rows, block))

    def _read(self, rows: Rows, block: int) -> np.ndarray:
        self.num_read += 1
        return rows.codes(block)


def draw(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, width)).astype(np.float32)


def slot_bytes(rows: Rows) -> int:
    return sum(rows.codes(block).nbytes for block in range(len(rows.blocks)))


@pytest.mark.parametrize("budget", [AMPLE, 0])
@pytest.mark.parametrize("tile_bytes", [device_scan.TILE_BYTES, 100_000])
@pytest.mark.parametrize("share", [None, 0.9, 0.1, 0.0])
@pytest.mark.parametrize("width", [64, 1024])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("device", DEVICES)
def test_no_row_that_is_left_out_scores_more_than_the_limit(
    device: str,
    bits: int,
    width: int,
    share: float | None,
    tile_bytes: int,
    budget: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_scan, "TILE_BYTES", tile_bytes)
    kept = None if share is None else np.random.default_rng(1).random(COUNT) < share
    rows, decoded = rows_of(bits, width, kept)
    queries = draw(5, width) * np.array([[1e-20], [1], [1e4], [1], [0]], np.float32)
    queries[3, 0] = 50  # its peak
    scan = DeviceScan(torch.device(device), budget)
    scores = queries.astype(np.float64) @ decoded.T
    may = np.arange(COUNT) if kept is None else np.flatnonzero(kept)
    for _ in range(2):  # from the store, then from the device
        for sign, candidates in zip((1, -1), scan.candidates("slot", queries, bits, rows, 20), strict=True):
            assert candidates.rows.shape == (5, min(20, len(may)))
            for query, (own, limit) in enumerate(zip(candidates.rows, candidates.limits, strict=True)):
                assert set(own) <= set(may)
                assert len(set(own)) == len(own)
                out = np.setdiff1d(may, own)
                assert (sign * scores[query, out] <= limit).all()
                if query in (1, 2, 3):
                    best = may[np.argsort(-sign * scores[query, may])[:5]]
                    assert set(best) <= set(own), "twenty by their bounds hold the five best"


@pytest.mark.parametrize("arrange", ARRANGEMENTS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("device", DEVICES)
def test_a_scan_finds_what_a_reading_of_all_finds(device: str, bits: int, arrange: Arrange) -> None:
    queries, sketches = arranged(arrange, np.random.default_rng(bits), 5, 128, COUNT)
    rows, decoded = coded(sketches, bits)
    scores, scan = queries.astype(np.float64) @ decoded.T, DeviceScan(torch.device(device), AMPLE)
    for k in (1, 10, 500):
        for own, answer in zip(
            scores.astype(np.float32), scan.scan("slot", queries, bits, rows, k, scorer(scores)), strict=True
        ):
            assert sides(answer, k) == sides((np.arange(COUNT), own), k)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("device", DEVICES)
def test_limits_are_no_wider_than_they_need_be(device: str, bits: int) -> None:
    """What products may lose is small against the distance between the tenth and the eighteenth score."""
    rows, decoded = rows_of(bits, 4096)
    queries = draw(8, 4096)
    largest, _ = DeviceScan(torch.device(device), AMPLE).candidates("slot", queries, bits, rows, 18)
    tenth = -np.sort(-(queries @ decoded.T), axis=1)[:, 9]
    assert (tenth > largest.limits).all()


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_held_is_not_read_again_and_the_least_recently_used_leaves(device: str) -> None:
    bits = {"a": 1, "b": 1, "c": 1, "large": 8}
    slots = {name: CountedRows(rows_of(bits[name], 64)[0]) for name in bits}
    scan = DeviceScan(torch.device(device), 2 * slot_bytes(rows_of(1, 64)[0]))
    whole, reads = len(slots["a"].rows.blocks), dict.fromkeys(bits, 0)
    for name, num_read, held in (
        ("a", whole, ["a"]),
        ("a", 0, ["a"]),
        ("b", whole, ["a", "b"]),
        ("a", 0, ["b", "a"]),
        ("c", whole, ["a", "c"]),
        ("a", 0, ["c", "a"]),
        ("large", whole, ["c", "a"]),  # nobody leaves for what is larger than all that may be held
        ("large", whole, ["c", "a"]),
        ("b", whole, ["a", "b"]),
    ):
        scan.candidates(name, draw(1, 64), bits[name], slots[name].rows, 5)
        reads[name] += num_read
        assert {name: rows.num_read for name, rows in slots.items()} == reads
        assert scan.held == held


def test_blocks_without_kept_rows_are_not_read_unless_they_are_to_be_held() -> None:
    rows, _ = rows_of(1, 64, np.arange(COUNT) < 10)
    for budget, expected in ((0, 1), (AMPLE, len(rows.blocks))):
        counted = CountedRows(rows)
        DeviceScan(torch.device("cpu"), budget).candidates("slot", draw(1, 64), 1, counted.rows, 5)
        assert counted.num_read == expected


def test_without_a_budget_a_device_that_tells_no_free_memory_holds_nothing() -> None:
    scan = DeviceScan(torch.device("cpu"))
    scan.candidates("slot", draw(1, 64), 1, rows_of(1, 64)[0], 5)
    assert scan.held == []


@contextmanager
def at_most_bytes_more(num_bytes: int) -> Iterator[None]:
    """Of this process's memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit on memory")
def test_a_device_without_memory_for_a_slot_scans_it_block_by_block(caplog: pytest.LogCaptureFixture) -> None:
    width, block, count = 1024, 1024, 1 << 18  # rows of 1 GiB, all blocks the same
    codes = draw(block, width) / np.float32(32)
    starts = range(0, count, block)
    rows = Rows(
        blocks=[range(start, start + block) for start in starts],
        codes=lambda _: codes,
        factors=np.ones(count, np.float32),
        longest=float(np.linalg.norm(codes, axis=1).max()),
        row_bytes=4 * width,
        kept=np.arange(count) >= count - block,
    )
    scan, (small, _) = DeviceScan(torch.device("cpu"), 2 * count * width * 4), rows_of(1, 64)
    scan.candidates("small", draw(1, 64), 1, small, 5)
    with at_most_bytes_more(512 << 20), caplog.at_level(logging.WARNING):
        largest, _ = scan.candidates("large", draw(1, width), 32, rows, 20)
    best = np.argsort(-(draw(1, width)[0].astype(np.float64) @ codes.astype(np.float64).T))[:5]
    assert set(count - block + best) <= set(largest.rows[0])
    assert f"from now on at most {slot_bytes(small)} bytes of codes stay there" in caplog.text
    caplog.clear()
    scan.candidates("large", draw(1, width), 32, rows, 20)
    scan.candidates("small", draw(1, 64), 1, small, 5)
    assert (scan.held, caplog.text) == (["small"], "")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit on memory")
def test_a_device_without_memory_for_a_scan_lets_go_of_what_it_holds(caplog: pytest.LogCaptureFixture) -> None:
    width, count, query = 1024, 1 << 17, draw(1, 1024)

    def repeated(bits: int) -> Rows:
        """One block again and again."""
        rows, _ = rows_of(bits, width)
        blocks = [range(start, start + len(rows.blocks[0])) for start in range(0, count, len(rows.blocks[0]))]
        factors = np.tile(rows.factors[: len(blocks[0])], len(blocks))
        return replace(rows, blocks=blocks, codes=lambda _: rows.codes(0), factors=factors)

    scan, signs = DeviceScan(torch.device("cpu"), AMPLE), repeated(1)
    scan.candidates("floats", query, 32, repeated(32), 5)
    want = scan.candidates("signs", query, 1, signs, 64)
    assert scan.held == ["floats", "signs"]
    # A tile of signs takes 256 MiB, which is more; the floats held 512 MiB.
    with at_most_bytes_more(160 << 20), caplog.at_level(logging.WARNING):
        got = scan.candidates("signs", query, 1, signs, 64)
    for mine, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(mine.limits, other.limits)
    assert scan.held == []
    held = count * width * 4 + count * width // 8
    assert f"{held} bytes of codes left it, and at most 0 stay there from now on" in caplog.text


@needs_cuda
def test_a_gpu_without_memory_for_a_slot_scans_it_block_by_block(caplog: pytest.LogCaptureFixture) -> None:
    rows, _ = rows_of(32, 1024)
    blocks = [range(start, start + 64) for start in range(0, 1 << 20, 64)]  # 4 GiB, all blocks the same
    large = Rows(
        blocks=blocks,
        codes=lambda _: rows.codes(0),
        factors=np.ones(1 << 20, np.float32),
        longest=rows.longest,
        row_bytes=rows.row_bytes,
        kept=np.arange(1 << 20) < 64,
    )
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (1 << 30)) / total)
    try:
        with caplog.at_level(logging.WARNING):
            scan = DeviceScan(torch.device("cuda"), 1 << 40)
            largest, _ = scan.candidates("large", draw(1, 1024), 32, large, 64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert set(largest.rows[0]) == set(range(64))
    assert "cuda has no memory left for the codes of a slot" in caplog.text
    assert scan.held == []


@needs_cuda
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("short_sums", [False, True])
def test_limits_hold_whatever_precision_a_program_asks_for(
    bits: int, short_sums: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", short_sums)
    rows, decoded = rows_of(bits, 1024)
    queries, precision = draw(8, 1024), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        found = DeviceScan(torch.device("cuda"), AMPLE).candidates("slot", queries, bits, rows, 20)
    finally:
        torch.set_float32_matmul_precision(precision)
    scores = queries.astype(np.float64) @ decoded.T
    for sign, candidates in zip((1, -1), found, strict=True):
        for query, (own, limit) in enumerate(zip(candidates.rows, candidates.limits, strict=True)):
            assert (sign * scores[query, np.setdiff1d(np.arange(COUNT), own)] <= limit).all()


@pytest.fixture(scope="module", params=BITS, ids=lambda bits: f"{bits}bits")
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two parts, two of whose fifty examples are deleted."""
    path, task = tmp_path_factory.mktemp("device") / "two.index", LoopedTask(count=50)
    first, second = (SubsetTask(task, rows) for rows in PARTS)
    build(path, first, SketchConfig(width=WIDTH, bits=request.param))  # pyright: ignore[reportArgumentType]
    add_examples(second, path, block_rows=BLOCK_ROWS, progress=False)
    delete_examples(path, ids=["train/3", "train/30"])
    return path


@pytest.fixture(scope="module", params=["all", "some", "none"])
def budget(request: pytest.FixtureRequest, path: Path) -> int:
    """For all ten slots of the two parts, three, or none."""
    return {"all": AMPLE, "some": 3 * len(PARTS[0]) * row_bytes(WIDTH, open_index(path).bits), "none": 0}[request.param]


def on(device: str, path: Path, budget: int) -> Index:
    return Index(path, None, DeviceScan(torch.device(device), budget))


def sketches(count: int = 6) -> np.ndarray:
    drawn = draw(count * STEPS, WIDTH).reshape(count, STEPS, WIDTH)
    drawn[-1] = 0
    return drawn


def every_score(index: Index, pair: Pair, query: np.ndarray) -> np.ndarray:
    """Of all rows, by every stored sketch in float64, [N]."""
    stored = index.sketches(np.arange(index.num_rows)).astype(np.float64)
    steps = query.astype(np.float64)
    return stored[:, -1 if pair.slot is None else pair.slot] @ (
        steps.sum(0) if pair.query == TOTAL else steps[pair.query]
    )


@pytest.mark.parametrize("resolve", RESOLVES)
@pytest.mark.parametrize("device", DEVICES)
def test_answers_are_those_of_the_processor(path: Path, device: str, resolve: Any, budget: int) -> None:
    index, plain = on(device, path, budget), open_index(path)
    for k in (1, 7, 1000):
        for where in (None, "length < 4", "length > 100", 'id == "train/7" or id == "train/3"'):
            together = answered(index.search(sketches(), k, resolve, where=where))
            assert together == answered(plain.search(sketches(), k, resolve, where=where))
    alone = [index.search(query, 7, resolve) for query in sketches()]
    assert answered(alone) == answered(index.search(sketches(), 7, resolve))


@pytest.mark.parametrize("resolve", RESOLVES)
@pytest.mark.parametrize("device", DEVICES)
def test_answers_are_those_of_brute_force(path: Path, device: str, resolve: Any) -> None:
    index = on(device, path, AMPLE)
    for where in (None, "length < 4"):
        matching = np.ones(50, bool) if where is None else matching_rows(index.examples, where)
        rows = np.intersect1d(np.flatnonzero(matching), index.live_rows())
        for query, ranking in zip(sketches(), index.search(sketches(), 5, resolve, where=where), strict=True):
            for pair, step in zip(pairs(resolve, STEPS, STEPS), ranking.steps, strict=True):
                scores = every_score(index, pair, query)
                close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6 * np.abs(scores).max())
                for side, sign in ((step.proponents, 1), (step.opponents, -1)):
                    best = np.sort(sign * scores[rows])[::-1][:5]
                    close(sign * side.influences, best[best > 0])
                    close(side.influences, scores[side.rows])
                    assert set(side.rows) <= set(rows)


@pytest.mark.parametrize("device", DEVICES)
def test_several_threads_at_once_have_the_answers_of_one(path: Path, device: str, budget: int) -> None:
    index, plain, asked = on(device, path, budget), open_index(path), RESOLVES * 4
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda resolve: answered(index.search(sketches(), 5, resolve)), asked))
    assert found == [answered(plain.search(sketches(), 5, resolve)) for resolve in asked]


@pytest.mark.parametrize("device", DEVICES)
def test_equal_rows_come_by_row(tmp_path: Path, device: str) -> None:
    task = LoopedTask(count=50)
    task._examples = [Labelled((1, 2, 3))] * 50
    build(tmp_path / "equal.index", task)
    rankings = on(device, tmp_path / "equal.index", AMPLE).search(sketches(), 3)
    sides = [ids for ids, _ in answered(rankings) if ids]
    assert sides
    assert all(side == ("train/0", "train/1", "train/2") for side in sides)


@needs_cuda
def test_an_index_is_opened_on_a_gpu(whole_index: Path) -> None:
    index = open_index(whole_index, device="cuda")
    index.warm_up()
    assert answered(index.search(sketches(), 5)) == answered(open_index(whole_index).search(sketches(), 5))


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("gpu", r"device 'gpu' can't be used: .*such as 'cuda'; with device='cpu' searches need none"),
        ("cuda:4096", r"device 'cuda:4096' can't be used"),
        ("meta", r"device 'meta' can't be used: Cannot copy out of meta tensor"),
    ],
)
def test_a_device_that_is_not_there_is_named(whole_index: Path, device: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        open_index(whole_index, device=device)


def test_a_negative_budget_is_refused(whole_index: Path) -> None:
    with pytest.raises(ValueError, match="device_bytes is -1, expected at least 0"):
        open_index(whole_index, device_bytes=-1)


@pytest.mark.parametrize("kind", [torch.float16, torch.float32])
@pytest.mark.parametrize("values", [1, 2, 4, 8])
def test_rows_of_a_table_are_looked_up_as_one_number(kind: torch.dtype, values: int) -> None:
    cells = torch.randn(256, values, generator=torch.Generator().manual_seed(0)).to(kind)
    codes = torch.arange(255, -1, -1, dtype=torch.int32)
    assert torch.equal(looked_up(cells, codes), cells.flip(0).flatten())
