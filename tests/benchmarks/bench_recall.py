"""What approximate search finds and costs, by FAISS factory: on a real build and on Gaussian sketches of its shape.

    LOOPSWAY_GSM8K=FOLDER python tests/benchmarks/bench_recall.py [--examples 4000] [--smoke]

The real build is of a looped GPT trained for some steps on GSM8K; its given queries are of the test split. Each factory
is built over the total, and tried at growing effort until proponents and opponents are found by the default recall
floor, as a build does it. Times are of one query and k = 10, in the same turns as a scan of every code.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from bench_search import draw, stored_slot
from measurement import markdown_table, parse_arguments

from loopsway.experiments.looped_gpt import GPTTask, Shape
from loopsway.experiments.texts import DATA_VARIABLE, gsm8k_folder, gsm8k_texts, synthetic_texts
from loopsway.experiments.timing import median_seconds
from loopsway.indexer import Approximation, ExampleSketcher, SketchConfig, build_index
from loopsway.indexer.building.recall import GIVEN, HELD_OUT, Measured, measured
from loopsway.indexer.search.queries import query_vectors
from loopsway.indexer.search.slot import Slot, open_slots
from loopsway.indexer.store.folders import FileFacts
from loopsway.indexer.store.generation import Generation

K, QUERIES = 10, 32
EXAMPLES, SMOKE_EXAMPLES, WIDTH, SMOKE_WIDTH = 4000, 300, 8192, 256
SHAPE, SMOKE_SHAPE = Shape(dim=64, num_steps=4, num_bytes=96), Shape(dim=32, num_steps=2, num_bytes=16, batch=4)
TRAINING_STEPS = 200
HEADER = (
    *("rows", "factory", "bytes a row", "build s", "recall@10 at effort 1", "effort"),
    *("held out +", "held out -", "given +", "given -", "query ms", "x the scan"),
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stored:
    """Coded rows of one slot, and queries.

    Attributes:
        title: of its rows in the table.
        slot: whose rows they are, with its default FAISS factory.
        queries: rotated, float32 [Q, T + 1, W].
    """

    title: str
    slot: Slot
    queries: np.ndarray

    def with_factory(self, factory: str | None) -> Slot:
        """The same rows, to build other FAISS indices over."""
        return Slot(
            self.slot._generation,
            None,
            factors=self.slot.factors,
            norms=self.slot.norms,
            files={},
            factory=factory,
        )


def real(folder: Path, texts: Sequence[str], asked: Sequence[str], shape: Shape, config: SketchConfig) -> Stored:
    """The total of a build of a looped GPT that was trained on these texts."""
    begin = time.perf_counter()
    task = GPTTask(shape, texts, training_steps=TRAINING_STEPS)
    index = build_index(task, folder / f"real-{config.bits}.index", config, recall_floor=0, progress=False)
    sketches = ExampleSketcher(task, index.config).sketch(asked).values.numpy()
    title = f"{shape}, {len(texts):,} examples, W={index.width:,}, {index.bits} bits"
    print(f"{title}: built in {time.perf_counter() - begin:.0f} s", flush=True)
    part = index.manifest.parts[0]
    slots = open_slots(Generation(index.folder / part.folder, part.plan), part.own_files)
    return Stored(title=title, slot=slots[None], queries=query_vectors(sketches, index.config))


def gaussian(folder: Path, count: int, width: int, bits: int) -> Stored:
    slot = stored_slot(folder / f"gaussian-{bits}", count, width, bits, "cpu")
    queries = draw(2 * QUERIES, width).reshape(QUERIES, 2, width)
    return Stored(title=f"Gaussian, {count:,} x {width:,}, {bits} bits", slot=slot, queries=queries)


def factories(count: int, width: int) -> list[str | None]:
    """None is the default kind: RaBitQ for 1 bit, SQfp16 for 16."""
    cells = 1 << round(math.log2(math.sqrt(count)))
    subvectors = width // 8
    return [
        *(None, "SQ8", "SQfp16", "RaBitQ4", f"IVF{cells},SQ8", f"IVF{cells},RaBitQ", "HNSW32,SQ8"),
        *(f"IVF1,PQ{subvectors}x4fs", f"IVF{cells},PQ{subvectors}x4fs", f"IVF{cells},PQ{subvectors}x4fs,Refine(SQ8)"),
    ]


def compared(stored: Stored, repeats: int) -> Iterator[list[str]]:
    """A row of the table for each factory."""
    width = stored.queries.shape[2]
    built: dict[str | None, tuple[Slot, list[FileFacts], float, Measured, Measured]] = {}
    for factory in factories(len(stored.slot.factors), width):
        begin, slot = time.process_time(), stored.with_factory(factory)
        files = list(slot.build().values())
        seconds = time.process_time() - begin
        first = measured(slot, Approximation(factory=factory, recall_floor=0), stored.queries, 0)
        found = measured(slot, Approximation(factory=factory), stored.queries, 0)
        built[factory] = (slot, files, seconds, first, found)
    query = stored.queries[0, -1:]
    calls = {"scan": lambda: stored.slot.search(query, K)}
    for factory, (slot, _, _, _, found) in built.items():
        calls[str(factory)] = lambda slot=slot, effort=found.effort: slot.search(query, K, effort=effort)
    spent = median_seconds(calls, repeats)
    yield [stored.title, "scan of every code", *[""] * 9, f"{1e3 * spent['scan']:.2f}", "1.0"]
    for factory, (slot, files, seconds, first, found) in built.items():
        kinds = (found.recalls[kind] for kind in (HELD_OUT, GIVEN))
        own = spent[str(factory)]
        size = sum(facts["size_bytes"] for facts in files) / len(slot.factors)
        refused = "" if found.least >= Approximation().recall_floor else ", refused"
        yield [
            *(stored.title, factory or "default", f"{size:,.0f}", f"{seconds:.1f}", f"{first.least:.3f}"),
            f"{found.effort}{refused}",
            *(f"{value:.3f}" for recall in kinds for value in (recall.proponents, recall.opponents)),
            *(f"{1e3 * own:.2f}", f"{own / spent['scan']:.1f}"),
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help=f"of the real build (default: {EXAMPLES})")
    arguments = parse_arguments(parser)
    count, width, shape, data = arguments.examples, WIDTH, SHAPE, gsm8k_folder()
    if arguments.smoke:
        count, width, shape = SMOKE_EXAMPLES, SMOKE_WIDTH, SMOKE_SHAPE
    if data is None:
        print(f"GSM8K is skipped: {DATA_VARIABLE} names no folder; the real build is of sums in words\n")
        texts, asked = synthetic_texts(count), synthetic_texts(count + QUERIES)[count:]
    else:
        texts, asked = gsm8k_texts(data, count), gsm8k_texts(data, QUERIES, "test")
    with tempfile.TemporaryDirectory() as name:
        for bits in (1, 16):
            config = SketchConfig(width=width, bits=bits)
            real_rows = list(compared(real(Path(name), texts, asked, shape, config), arguments.repeats))
            noise = compared(gaussian(Path(name), count, width, bits), arguments.repeats)
            print("\n" + markdown_table(HEADER, [*real_rows, *noise]), flush=True)


if __name__ == "__main__":
    main()
