"""What scoring whole query sets costs, in time and memory, beside a matrix product of the same size.

    python tests/benchmarks/bench_curation.py [--threads 2] [--smoke]

The index is synthetic, of random codes and one step. Queries are random sketches of one step, made as they are asked
for: what is measured is scoring, without the model. The limit is torch's float32 product of as many queries with rows
that lie decoded in memory, measured on one block in the same process and scaled up; a mean needs one reading of the
codes instead. Memory is the most anonymous memory above what there was before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from bench_store import peak_memory, random_block, synthetic_plan
from measurement import markdown_table, parse_arguments

from loopsway.experiments.timing import median_seconds
from loopsway.indexer import Index, find_duplicates, find_neighbors, open_index, score_examples, step_energies
from loopsway.indexer.building.publication import publish
from loopsway.indexer.curation.query_set import QuerySet
from loopsway.indexer.store.folders import LocalFolder
from loopsway.indexer.store.generation import Generation
from loopsway.indexer.store.manifest import Part, Plan
from loopsway.indexer.store.output import write_table
from loopsway.indexer.store.row_table import ROWS, write_row_table

SETS = ((100_000, 1_024, 10_000), (100_000, 8_192, 500))  # examples, width, queries
SMOKE_SETS = ((300, 256, 20),)
DUPLICATES, TOP = 20_000, 0.001


class RandomQueries(QuerySet):
    """So many sketches [1, W], each made of its number."""

    def __init__(self, count: int, width: int) -> None:
        self.ids, self.digest, self._width = [str(query) for query in range(count)], "random", width

    def sketches(self, queries: range) -> np.ndarray:
        return np.stack([np.random.default_rng(each).standard_normal((1, self._width), np.float32) for each in queries])


def synthetic_index(path: Path, count: int, width: int) -> Index:
    """Published without FAISS files, which nothing here reads."""
    plan, name = Plan.from_dict(synthetic_plan(count, width).to_dict() | {"num_steps": 1}), "generations/000001"
    folder = LocalFolder(path)
    generation = Generation(folder / name, plan)
    generation.create()
    for block in range(plan.num_blocks):
        generation.write(block, random_block(plan, block))
    ids = [f"example-{row}" for row in range(count)]
    skipped = pa.table(
        {"row": pa.array([], pa.int64()), "id": pa.array([], pa.string()), "reason": pa.array([], pa.string())}
    )
    files = {
        "examples.parquet": write_table(
            generation.folder, "examples.parquet", pa.table({"id": ids, "description": ids})
        ),
        "skipped.parquet": write_table(generation.folder, "skipped.parquet", skipped),
        ROWS: write_row_table(generation),
    }
    part = Part(
        folder=name, plan=plan, steps_without_gradient=(), mean_losses=(0.0, 0.0), num_skipped=0, sketching=(),
        files={f"{name}/{file}": facts for file, facts in files.items()},
    )  # fmt: skip
    publish(folder, [part], lambda: None)
    return open_index(path)


def measured(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the wall, and MiB."""
    with peak_memory() as peak:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin, peak()


def product_seconds(index: Index, num_vectors: int, repeats: int) -> float:
    """Torch's float32 product of so many vectors with all rows, and reading the codes once, scaled up from a block."""
    rows = torch.from_numpy(index.codes.decoded(None, np.arange(len(index.blocks()[0]))))
    vectors = torch.randn(min(num_vectors, 512), index.width)
    seconds = median_seconds({"product": lambda: vectors @ rows.T}, repeats)["product"]
    return seconds * (num_vectors / len(vectors)) * (index.num_rows / len(rows))


def jobs_of(index: Index, queries: QuerySet, folder: Path) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Of each job, the vectors that all rows are multiplied by, and the call."""
    few = queries.sketches(range(min(64, len(queries))))
    ids = [f"example-{row}" for row in range(64)]
    each: dict[str, Any] = {"per": "each", "top": TOP, "progress": False}
    return {
        f"mean of {len(queries):,} queries": (
            1, lambda: score_examples(index, queries, folder / "mean", progress=False)),
        f"each of {len(queries):,} queries, top {TOP:.1%}": (
            2 * len(queries), lambda: score_examples(index, queries, folder / "each", **each)),
        f"energies of {len(few)} queries": (len(few), lambda: step_energies(index, few)),
        "neighbors of 64 examples": (len(ids), lambda: find_neighbors(index, ids)),
    }  # fmt: skip


def table(folder: Path, sets: tuple[tuple[int, int, int], ...], duplicates: int, repeats: int) -> str:
    rows: list[tuple[str, ...]] = []

    def run(index: Index, name: str, num_vectors: int, job: Callable[[], Any]) -> None:
        seconds, mib = measured(job)
        limit = product_seconds(index, num_vectors, repeats)
        of = f"{index.num_rows:,} x {index.width:,}, 1 bit"
        rows.append((of, name, f"{seconds:.1f}", f"{seconds / limit:.2f}", f"{mib:.0f}"))

    for count, width, num_queries in sets:
        own = folder / f"{count}-{width}"
        index = synthetic_index(own / "of.index", count, width)
        for name, (num_vectors, job) in jobs_of(index, RandomQueries(num_queries, width), own).items():
            run(index, name, num_vectors, job)
    index = synthetic_index(folder / "duplicates.index", duplicates, sets[-1][1])
    pairs = folder / "pairs"
    run(index, "all near-duplicates", duplicates, lambda: find_duplicates(index, pairs, progress=False))
    return markdown_table(("index", "job", "s", "/ float32 products", "peak MiB"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments = parse_arguments(parser, threads=2)
    sets, duplicates = (SMOKE_SETS, 300) if arguments.smoke else (SETS, DUPLICATES)
    with tempfile.TemporaryDirectory() as folder:
        print(table(Path(folder), sets, duplicates, arguments.repeats))


if __name__ == "__main__":
    main()
