"""What searching costs: scans of stored codes beside FAISS, numpy and torch on the same rows, and the limits.

    python tests/benchmarks/bench_search.py [--threads 2] [--device cuda] [--smoke]

Rows are Gaussian sketches, coded. Times are of the k = 10 best rows of both signs (FAISS, numpy, torch: of one sign),
medians of several in turns, milliseconds of the wall: quiet machine needed. The limit of one query is reading the codes
once, measured in the same turns; that of a batch is torch's float32 product with rows that lie decoded in memory. With
--device, "ours" scans there; what it is compared with stays on the processor.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from bench_store import synthetic_plan
from measurement import markdown_table, median_seconds, parse_arguments

from loopsway.indexer.config import SketchConfig
from loopsway.indexer.search.device_scan import device_scan
from loopsway.indexer.search.slot import Slot, open_slots
from loopsway.indexer.sketches.coding import code_examples
from loopsway.indexer.store.folders import LocalFolder
from loopsway.indexer.store.generation import CodedExamples, Generation
from loopsway.indexer.store.manifest import Plan
from loopsway.indexer.store.row_table import ROWS, write_row_table

K = 10
BATCHES = (1, 17, 64)  # 17: a query's 16 steps and their total, which QUERY_STEP asks of one slot
COUNT, GROWTH, SMOKE_COUNT = 100_000, (10_000, 100_000, 400_000), 300


def stored_slot(folder: Path, count: int, width: int, bits: int, device: str) -> Slot:
    """The total of a synthetic part of one step, as a build stores it."""
    plan = Plan.from_dict(
        synthetic_plan(count, width).to_dict()
        | {"config": SketchConfig(width=width, bits=bits).to_dict(), "num_steps": 1}
    )
    generation = Generation(LocalFolder(folder), plan)
    generation.create()
    for block in range(plan.num_blocks):
        rows = torch.randn(len(plan.rows_of(block)), 1, width, generator=torch.Generator().manual_seed(block))
        steps, total = code_examples(rows, seed=0, bits=bits)
        losses = np.zeros((len(plan.checkpoints), len(rows)), np.float32)
        generation.write(block, CodedExamples(steps=steps, total=total, losses=losses, steps_without_gradient=()))
    slots = open_slots(generation, {ROWS: write_row_table(generation)}, device_scan=device_scan(device))
    return slots[None]


def read_codes(slot: Slot) -> Callable[[], Any]:
    """Reads a slot's codes once, with torch's threads."""
    bytes_of_all = np.concatenate([block.view(np.uint8).ravel() for block in code_blocks(slot)])
    words = torch.from_numpy(bytes_of_all[: len(bytes_of_all) // 8 * 8].view(np.int64))
    return lambda: words.sum()


def code_blocks(slot: Slot) -> list[np.ndarray]:
    rows = slot._rows_to_scan(None)
    return [rows.codes(block) for block in range(len(rows.blocks))]


def draw(count: int, width: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)


def right_ids(slot: Slot, queries: np.ndarray) -> bool:
    """Whether a search's rows are those of a brute-force reading, of both signs."""
    scores = np.concatenate([queries.astype(np.float64) @ block.T for block in slot.blocks()], axis=1)
    order = np.argsort(-scores, axis=1)
    found = slot.search(queries, K)
    return all(
        np.array_equal(rows[:K], order[query, :K]) and np.array_equal(rows[-K:], order[query, -K:])
        for query, (rows, _) in enumerate(found)
    )


def compared(
    folder: Path, count: int, width: int, bits: int, repeats: int, device: str, *, peers: bool
) -> list[list[str]]:
    """One row of the table for each way to search this slot."""
    slot = stored_slot(folder / f"{count}-{width}-{bits}", count, width, bits, device)
    slot.build()
    read, size = read_codes(slot), sum(block.nbytes for block in code_blocks(slot))
    ways: dict[str, tuple[int, Callable[[np.ndarray], Any]]] = {
        "ours": (size, lambda queries: slot.search(queries, K)),
        "ours, exact=False (FAISS)": (size, lambda queries: slot.search(queries, K, effort=1)),
    }
    if peers:
        ways |= peers_of(np.concatenate(list(slot.blocks())))
    cells = {name: [f"{size / 1e6:,.0f}"] for name, (size, _) in ways.items()}
    for batch in BATCHES:
        queries = draw(batch, width)
        calls = {name: (lambda run=run, queries=queries: run(queries)) for name, (_, run) in ways.items()}
        seconds = median_seconds({"read": read, **calls}, repeats)
        for name in ways:
            cells[name].append(f"{1e3 * seconds[name]:.1f} ({seconds[name] / seconds['read']:.1f}x)")
    right = right_ids(slot, draw(4, width))
    title = f"{count:,} x {width:,}, {bits} bits"
    return [[title, name, *own, str(right) if name == "ours" else ""] for name, own in cells.items()]


def peers_of(rows: np.ndarray) -> dict[str, tuple[int, Callable[[np.ndarray], Any]]]:
    flat = faiss.IndexFlatIP(rows.shape[1])
    halves = faiss.IndexScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for index in (flat, halves):
        index.add(rows)
    tensor = torch.from_numpy(rows)
    short = tensor.bfloat16()
    return {
        "FAISS flat float32": (rows.nbytes, lambda queries: flat.search(queries, K)),
        "FAISS SQfp16": (rows.nbytes // 2, lambda queries: halves.search(queries, K)),
        "numpy sgemm, argpartition": (
            rows.nbytes, lambda queries: np.argpartition(queries @ rows.T, -K, axis=1)[:, -K:]),
        "torch float32 matmul, topk": (
            rows.nbytes, lambda queries: (torch.from_numpy(queries) @ tensor.T).topk(K, 1)),
        "torch bfloat16 matmul, topk": (
            rows.nbytes // 2, lambda queries: (torch.from_numpy(queries).bfloat16() @ short.T).topk(K, 1)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="of our scan (default: cpu)")
    arguments = parse_arguments(parser, threads=2)
    faiss.omp_set_num_threads(arguments.threads)
    count, growth, repeats = COUNT, GROWTH, arguments.repeats
    if arguments.smoke:
        count, growth = SMOKE_COUNT, (SMOKE_COUNT,)
    header = ["rows", "search", "MB", *(f"{batch} queries, ms (x one read)" for batch in BATCHES), "ids right"]
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for width, bits, peers in ((8192, 1, True), (4096, 16, False), (1024, 16, True), (1024, 8, False)):
            width //= 8 if arguments.smoke else 1
            rows += compared(Path(folder), count, width, bits, repeats, arguments.device, peers=peers)
        print(markdown_table(header, rows), flush=True)
        grown = [
            row
            for size in growth
            for row in compared(Path(folder) / "g", size, 1024, 1, repeats, arguments.device, peers=False)
        ]
        print("\n" + markdown_table(header, grown), flush=True)


if __name__ == "__main__":
    main()
