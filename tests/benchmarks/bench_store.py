"""What storing, opening and verifying an index costs, beside raw reads and writes of the same bytes.

    python tests/benchmarks/bench_store.py [--folder FOLDER] [--smoke]

The index is synthetic: random codes of W=8192 at 1 bit, 8 steps, 2 checkpoints, in blocks of 2,048 rows. Each size runs
in a process of its own, whose memory is watched. The second table is of what writing adds to sketching: blocks of 128
examples of bench_sketch.py's workload (b).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from measurement import markdown_table, parse_arguments
from sketch_models import workload

from loopsway.experiments.texts import gsm8k_folder, gsm8k_texts, synthetic_texts
from loopsway.indexer import Checkpoint, ExampleSketcher, Loop, SketchConfig, open_index, verify_index
from loopsway.indexer.building.part import MOST_BLOCK_ROWS
from loopsway.indexer.building.publication import finished_part, publish
from loopsway.indexer.progress import BuildProgress
from loopsway.indexer.search.faiss_index import import_faiss
from loopsway.indexer.search.shards import shard_rows
from loopsway.indexer.sketches.coding import Codes, code_examples, row_bytes
from loopsway.indexer.stopping import Stop
from loopsway.indexer.store.entries import CodedExamples
from loopsway.indexer.store.folders import LocalFolder
from loopsway.indexer.store.generation import Generation
from loopsway.indexer.store.manifest import PLAN, Plan
from loopsway.indexer.store.sealed import write_sealed

SIZES, SMOKE_SIZES = (4_096, 16_384, 65_536), (300,)
WIDTH, SMOKE_WIDTH, STEPS = 8192, 256, 8
CHECKPOINTS = tuple(Checkpoint(name=name, learning_rate=0.1) for name in ("a", "b"))
MIB = 1 << 20


def synthetic_plan(count: int, width: int) -> Plan:
    rows = MOST_BLOCK_ROWS
    return Plan(
        fingerprint="synthetic",
        task_spec=None,
        loop=Loop(body=["block"]),
        config=SketchConfig(width=width),
        checkpoints=CHECKPOINTS,
        parameters={"block.weight": (width, width)},
        num_examples=count,
        num_steps=STEPS,
        examples_digest="",
        task_code="",
        checkpoint_digests={},
        batch_size=32,
        block_rows=rows,
        shard_rows=shard_rows(count, row_bytes(width, 1), rows),
    )


def random_block(plan: Plan, block: int) -> CodedExamples:
    draw, count = np.random.default_rng(block), len(plan.rows_of(block))

    def codes(rows: int) -> Codes:
        factors, norms = draw.random((2, rows), dtype=np.float32) + 0.5
        return Codes(codes=draw.integers(0, 256, (rows, plan.width // 8), np.uint8), factors=factors, norms=norms)

    losses = draw.random((len(plan.checkpoints), count), dtype=np.float32)
    return CodedExamples(
        steps=codes(count * plan.num_steps), total=codes(count), losses=losses, steps_without_gradient=()
    )


def measured(folder: Path, count: int, width: int, repeats: int) -> dict[str, float]:
    """One size: seconds, and MiB of resident memory."""
    path, plan = folder / "synthetic.index", synthetic_plan(count, width)
    name = "generations/000001"
    part = path / name
    generation = Generation(LocalFolder(part), plan)
    generation.create()
    found: dict[str, float] = {}
    seconds, raw = [], []
    with peak_memory() as peak:
        for block in range(plan.num_blocks):
            coded = random_block(plan, block)
            seconds.append(timed(lambda block=block, coded=coded: generation.write(block, coded)))
            raw.append(timed(lambda block=block, coded=coded: raw_write(folder / f"raw-{block}", coded)))
        found |= {"write": sum(seconds), "raw write": sum(raw), "write MiB": peak()}
    ids = [f"example-{row}" for row in range(count)]
    write_sealed(LocalFolder(part), PLAN, plan.to_dict())
    table = pa.table({"id": ids, "description": ids})

    def finish() -> None:
        stop = Stop(lambda: None)
        made = finished_part(LocalFolder(path), name, generation, table, sketching=[], bars=bars, stop=stop)
        publish(LocalFolder(path), [made], lambda: None)

    with peak_memory() as peak, BuildProgress(shown=False) as bars:
        found["index"] = timed(finish)
        found["index MiB"] = peak()
    found["bytes"] = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
    found["verify"] = statistics.median(timed(lambda: verify_index(path, progress=False)) for _ in range(repeats))
    found["raw read"] = statistics.median(timed(lambda: raw_read(part)) for _ in range(repeats))
    return found


def opened(path: Path, repeats: int) -> dict[str, float]:
    """Of an index that this process has not touched: opening, memory, the first search and later ones."""
    import_faiss()
    before, begin = resident(), time.perf_counter()
    index = open_index(path)
    found = {"open": time.perf_counter() - begin, "open MiB": (resident() - before) / MIB}
    queries = np.random.default_rng(0).standard_normal((repeats + 1, STEPS, index.width)).astype(np.float32)
    found["warm up"] = timed(index.warm_up)
    found["first"] = timed(lambda: index.search(queries[0], k=10))
    found["later"] = statistics.median(timed(lambda query=query: index.search(query, k=10)) for query in queries[1:])
    return found


def raw_write(file: Path, coded: CodedExamples) -> None:
    """The same bytes into one memory map, made durable once."""
    parts = [coded.steps.codes, coded.total.codes, coded.steps.factors, coded.steps.norms]
    values = np.concatenate([np.ascontiguousarray(part).view(np.uint8).ravel() for part in parts])
    mapped = np.memmap(file, np.uint8, mode="w+", shape=values.shape)
    mapped[:] = values
    mapped.flush()
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def raw_read(folder: Path) -> int:
    return sum(int(np.memmap(file, np.uint8, mode="r").max()) for file in folder.rglob("*") if file.is_file())


def timed(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def peak_memory() -> Iterator[Callable[[], float]]:
    """Most anonymous memory meanwhile, MiB above what was there: file pages are the system's to drop."""

    def anonymous() -> int:
        pages = Path("/proc/self/statm").read_text().split()
        return (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")

    before, highest, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], anonymous() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: highest[0] / MIB
    finally:
        done.set()
        watcher.join()


def size_table(folder: Path, arguments: argparse.Namespace) -> str:
    rows = []
    for count in SMOKE_SIZES if arguments.smoke else SIZES:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            common = ["--of", name, "--count", str(count), "--threads", str(arguments.threads)]
            common += ["--smoke"] if arguments.smoke else []
            found = child([*common, "--measure", "store"])
            openings = [child([*common, "--measure", "open"]) for _ in range(1 if arguments.smoke else 5)]
            found |= {key: statistics.median(each[key] for each in openings) for key in openings[0]}
        size = found["bytes"] / MIB
        cells = (
            *(f"{found['write']:.2f}", f"{found['write'] / found['raw write']:.1f}", f"{found['write MiB']:.0f}"),
            *(f"{found['index']:.1f}", f"{found['index MiB']:.0f}"),
            *(f"{1e3 * found['open']:.0f}", f"{found['open MiB']:.0f}"),
            *(f"{1e3 * found['warm up']:.0f}", f"{found['first'] / found['later']:.2f}"),
            *(f"{size / found['verify']:.0f}", f"{found['verify'] / found['raw read']:.1f}"),
        )
        rows.append((f"{count:,}", f"{size:.0f}", *cells))
    return markdown_table(
        ("N", "MiB", "writing, s", "/ raw", "peak MiB", "indexing, s", "peak MiB", "open, ms", "adds MiB",
         "warm-up, ms", "first search / later", "verify, MiB/s", "time / raw read"), rows
    )  # fmt: skip


def child(arguments: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def share_table(folder: Path, *, smoke: bool, repeats: int) -> str:
    """What writing adds to sketching, on workload (b)."""
    chosen, count = workload("b", smoke=smoke), 16 if smoke else 128
    data = gsm8k_folder()
    texts = gsm8k_texts(data, count) if data is not None else synthetic_texts(count)
    task = chosen.task(texts)
    config = SketchConfig(width=SMOKE_WIDTH if smoke else WIDTH)
    sketcher = ExampleSketcher(task, config, batch_size=chosen.shape.batch)
    sketcher.sketch(texts[:2])
    plan = synthetic_plan(count, config.width or WIDTH)
    sketching, writing = [], []
    for turn in range(repeats):
        begin = time.perf_counter()
        sketches = sketcher.sketch(texts)
        steps, total = code_examples(sketches.values, seed=0, bits=1)
        sketching.append(time.perf_counter() - begin)
        losses = np.repeat(sketches.losses.numpy(), len(CHECKPOINTS), axis=0)
        coded = CodedExamples(steps=steps, total=total, losses=losses, steps_without_gradient=())
        part = folder / f"share-{turn}"
        generation = Generation(LocalFolder(part), _with_steps(plan, sketches.values.shape[1]))
        generation.create()
        writing.append(timed(lambda generation=generation, coded=coded: generation.write(0, coded)))
    share = statistics.median(writing) / statistics.median(sketching)
    row = (str(chosen), str(count), f"{statistics.median(sketching):.2f}", f"{1e3 * statistics.median(writing):.0f}")
    return markdown_table(
        ("model", "examples", "sketching, s", "writing, ms", "writing adds"), [(*row, f"{share:.1%}")]
    )


def _with_steps(plan: Plan, num_steps: int) -> Plan:
    return Plan.from_dict(plan.to_dict() | {"num_steps": num_steps})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--measure", choices=["store", "open"], help=argparse.SUPPRESS)
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parse_arguments(parser, threads=2)
    if arguments.measure == "store":
        width = SMOKE_WIDTH if arguments.smoke else WIDTH
        print(json.dumps(measured(arguments.of, arguments.count, width, arguments.repeats)))
    elif arguments.measure == "open":
        print(json.dumps(opened(arguments.of / "synthetic.index", arguments.repeats)))
    else:
        print(size_table(arguments.folder, arguments), flush=True, end="\n\n")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            print(share_table(Path(name), smoke=arguments.smoke, repeats=arguments.repeats))


if __name__ == "__main__":
    main()
