"""The peak memory of sketching a batch, in tables, and the largest batch within a limit.

B examples, S steps, W width. What a peak is, `loopsway.experiments.memory` says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from measurement import markdown_table
from sketch_models import WORKLOADS, Workload, workload

from loopsway.experiments.memory import Job, peaks
from loopsway.experiments.reference import DEFAULT_PROJECTION
from loopsway.experiments.ways import Way
from loopsway.indexer import SketchConfig

DEFAULT = SketchConfig()
WAYS = {
    "plain step": Way(tool="plain"),
    "ours": Way(tool="ours", size=DEFAULT.width, bits=DEFAULT.bits),
    f"reference, m={DEFAULT_PROJECTION}": Way(tool="reference", size=DEFAULT_PROJECTION),
    "reference, exact": Way(tool="reference"),
}
TITLES = ("plain step", "ours", "ours, first batch", f"reference, m={DEFAULT_PROJECTION}", "reference, exact")
MIB = 1 << 20
LIMIT_BYTES = 4 << 30
TARGET = 1.2  # of a plain step's peak, besides the sketches


def memory_tables(letters: Sequence[str], *, threads: int, verify: bool, smoke: bool) -> str:
    """The peaks against B; then the largest batch within the limit.

    Args:
        letters: of models.
        threads: of torch.
        verify: measure the largest batches too: they are told from a line through the peaks of two smaller ones.
        smoke: nothing is told.
    """
    rows, largest = [], []
    for letter in letters:
        chosen, batches = workload(letter, smoke=smoke), batches_of(letter, smoke=smoke)
        found: dict[str, dict[int, int]] = {}
        for title in WAYS:
            found |= _measured(chosen, title, batches, threads)
        rows += [_peak_row(chosen.sized(batch=batch), found) for batch in batches]
        sizes = {title: largest_batch(each) for title, each in found.items()}
        if verify and not smoke:
            for title in WAYS:
                found[title] |= _measured(chosen, title, (sizes[title],), threads)[title]
        cells = [_largest_cell(sizes[title], found[title]) for title in TITLES]
        ratio = sizes["ours"] / max(1, sizes["reference, exact"])
        largest.append((str(chosen).rpartition(", batch")[0], *cells, f"{ratio:.1f}"))
    header = ("model", *(f"{title}, MiB" for title in TITLES), "sketches, MiB", "(ours - sketches) / plain")
    columns = (f"batch within {LIMIT_BYTES >> 30} GiB", *TITLES, "ours / exact")
    return markdown_table(header, rows) + ("" if smoke else "\n\n" + markdown_table(columns, largest))


def batches_of(letter: str, *, smoke: bool) -> tuple[int, ...]:
    if smoke:
        return (1, 4)
    return (1, 2, 4) if WORKLOADS[letter].shape.num_steps > 16 else (4, 16, 32)


def largest_batch(found: dict[int, int]) -> int:
    """Within the limit, by a line through the peaks, in bytes by B, of the two largest batches."""
    low, high = sorted(found)[-2:]
    slope = max(1.0, (found[high] - found[low]) / (high - low))
    return max(0, low + math.floor((LIMIT_BYTES - found[low]) / slope))


def _measured(chosen: Workload, title: str, batches: tuple[int, ...], threads: int) -> dict[str, dict[int, int]]:
    """Peaks in bytes of one way, by B; of ours also those of a first batch."""
    job = Job(task=chosen.kind.__name__, shape=chosen.shape, way=WAYS[title], batches=batches, threads=threads)
    found = peaks(job)
    return {title: found.later} | ({f"{title}, first batch": found.first} if found.first else {})


def _peak_row(chosen: Workload, found: dict[str, dict[int, int]]) -> tuple[str, ...]:
    shape, width = chosen.shape, DEFAULT.width
    assert width is not None
    sketches = 4 * shape.batch * shape.num_steps * width
    ratio = (found["ours"][shape.batch] - sketches) / found["plain step"][shape.batch]
    cells = (f"{found[title][shape.batch] / MIB:.0f}" for title in TITLES)
    return (str(chosen), *cells, f"{sketches / MIB:.0f}", f"{ratio:.2f}" + ("" if ratio <= TARGET else " (over 1.2)"))


def _largest_cell(batch: int, found: dict[int, int]) -> str:
    return f"{batch} (measured: {found[batch] / (1 << 30):.2f} GiB)" if batch in found else str(batch)
