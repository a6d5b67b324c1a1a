"""What searching costs: scans of stored codes beside FAISS, numpy and torch on the same rows, and the limits.

    python tests/benchmarks/bench_search.py [--threads 2] [--device cuda] [--smoke]

Rows are Gaussian sketches, coded; recall is of proponents. Times are of the k = 10 best rows of both signs (FAISS,
numpy, torch: of one sign), medians of several in turns, milliseconds of the wall: quiet machine needed. The limit of
one query is reading the codes once, measured in the same turns; that of a batch is torch's float32 product with rows
that lie decoded in memory. With --device, "ours" scans there; what it is compared with stays on the processor.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from bench_store import synthetic_plan
from measurement import markdown_table, parse_arguments

from loopsway.experiments.timing import median_seconds
from loopsway.indexer.config import SketchConfig
from loopsway.indexer.search.device_scan import device_scan
from loopsway.indexer.search.slot import Slot, open_slots
from loopsway.indexer.sketches.coding import code_examples
from loopsway.indexer.store.entries import CodedExamples
from loopsway.indexer.store.folders import LocalFolder
from loopsway.indexer.store.generation import Generation
from loopsway.indexer.store.manifest import Plan
from loopsway.indexer.store.row_table import ROWS, write_row_table

K = 10
BATCHES = (1, 17, 64)  # 17: a query's 16 steps and their total, which QUERY_STEP asks of one slot
COUNT, GROWTH, SMOKE_COUNT = 100_000, (10_000, 100_000, 400_000), 300
# Width, bits, whether other exact searches are tried, and inexact ones.
SLOTS = ((8192, 1, True, False), (4096, 16, False, False), (1024, 16, True, True), (1024, 8, False, False))
GRAPH_LINKS, GRAPH_EFFORT, NUM_CELLS = 32, 128, 64


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


@dataclass(frozen=True)
class Way:
    """A way to search.

    Attributes:
        size: of what it reads, bytes.
        search: takes queries [M, W].
        ids: of what that gives, the K best rows of each query.
    """

    size: int
    search: Callable[[np.ndarray], Any]
    ids: Callable[[Any], Any]


def compared(
    folder: Path, count: int, width: int, bits: int, repeats: int, device: str, *, peers: bool, inexact: bool
) -> list[list[str]]:
    """One row of the table for each way to search this slot."""
    slot = stored_slot(folder / f"{count}-{width}-{bits}", count, width, bits, device)
    slot.build()
    read, size = read_codes(slot), sum(block.nbytes for block in code_blocks(slot))
    ways = {
        "ours": Way(size, lambda queries: slot.search(queries, K), best_of_answers),
        "ours, exact=False (FAISS)": Way(size, lambda queries: slot.search(queries, K, effort=1), best_of_answers),
    }
    rows = np.concatenate(list(slot.blocks()))
    if peers:
        ways |= peers_of(rows)
    if inexact:
        ways |= inexact_peers_of(rows)
    queries = draw(BATCHES[-1], width)
    best = np.argsort(-(queries @ rows.T), axis=1, kind="stable")[:, :K]
    cells = {}
    for name, way in ways.items():
        found = way.ids(way.search(queries))
        recall = np.mean([len(np.intersect1d(*each)) / len(each[0]) for each in zip(best, found, strict=True)])
        cells[name] = [f"{way.size / 1e6:,.0f}", f"{recall:.3f}"]
    for batch in BATCHES:
        queries = draw(batch, width)
        calls = {name: (lambda way=way, queries=queries: way.search(queries)) for name, way in ways.items()}
        seconds = median_seconds({"read": read, **calls}, repeats)
        for name in ways:
            cells[name].append(f"{1e3 * seconds[name]:.1f} ({seconds[name] / seconds['read']:.1f}x)")
    right = right_ids(slot, draw(4, width))
    title = f"{count:,} x {width:,}, {bits} bits"
    return [[title, name, *own, str(right) if name == "ours" else ""] for name, own in cells.items()]


def best_of_answers(answers: Any) -> list[np.ndarray]:
    return [rows[:K] for rows, _ in answers]


def peers_of(rows: np.ndarray) -> dict[str, Way]:
    flat = faiss.IndexFlatIP(rows.shape[1])
    halves = faiss.IndexScalarQuantizer(rows.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
    for index in (flat, halves):
        index.add(rows)
    tensor = torch.from_numpy(rows)
    short = tensor.bfloat16()
    return {
        "FAISS flat float32": Way(rows.nbytes, lambda queries: flat.search(queries, K), _second),
        "FAISS SQfp16": Way(rows.nbytes // 2, lambda queries: halves.search(queries, K), _second),
        "numpy sgemm, argpartition": Way(
            rows.nbytes, lambda queries: np.argpartition(queries @ rows.T, -K, axis=1)[:, -K:], np.asarray),
        "torch float32 matmul, topk": Way(
            rows.nbytes, lambda queries: (torch.from_numpy(queries) @ tensor.T).topk(K, 1), _second),
        "torch bfloat16 matmul, topk": Way(
            rows.nbytes // 2, lambda queries: (torch.from_numpy(queries).bfloat16() @ short.T).topk(K, 1), _second),
    }  # fmt: skip


def inexact_peers_of(rows: np.ndarray) -> dict[str, Way]:
    """A graph and cells, of float32 rows, at one setting each; bench_recall.py has the effort that a floor takes."""
    graph = faiss.index_factory(rows.shape[1], f"HNSW{GRAPH_LINKS},Flat", faiss.METRIC_INNER_PRODUCT)
    faiss.ParameterSpace().set_index_parameter(graph, "efSearch", GRAPH_EFFORT)
    cells = faiss.index_factory(rows.shape[1], f"IVF{NUM_CELLS},Flat", faiss.METRIC_INNER_PRODUCT)
    faiss.ParameterSpace().set_index_parameter(cells, "nprobe", NUM_CELLS // 4)
    ways = {}
    for name, index in ((f"FAISS HNSW{GRAPH_LINKS}, efSearch {GRAPH_EFFORT}", graph),
                        (f"FAISS IVF{NUM_CELLS}, nprobe {NUM_CELLS // 4}", cells)):  # fmt: skip
        index.train(rows)
        index.add(rows)
        ways[name] = Way(rows.nbytes, lambda queries, index=index: index.search(queries, K), _second)
    return ways


def _second(found: Any) -> np.ndarray:
    return np.asarray(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="of our scan (default: cpu)")
    arguments = parse_arguments(parser, threads=2)
    faiss.omp_set_num_threads(arguments.threads)
    count, growth, repeats = COUNT, GROWTH, arguments.repeats
    if arguments.smoke:
        count, growth = SMOKE_COUNT, (SMOKE_COUNT,)
    header = [
        "rows",
        "search",
        "MB",
        f"recall@{K}",
        *(f"{batch} queries, ms (x one read)" for batch in BATCHES),
        "ids right",
    ]
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for width, bits, peers, inexact in SLOTS:
            width //= 8 if arguments.smoke else 1
            asked = (count, width, bits, repeats, arguments.device)
            rows += compared(Path(folder), *asked, peers=peers, inexact=inexact)
        print(markdown_table(header, rows), flush=True)
        grown = [
            row
            for size in growth
            for row in compared(
                Path(folder) / "g", size, 1024, 1, repeats, arguments.device, peers=size <= COUNT, inexact=False
            )
        ]
        print("\n" + markdown_table(header, grown), flush=True)


if __name__ == "__main__":
    main()
