"""The end of a build: FAISS indices, a measurement of their recall, and the manifest that publishes a generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from ..progress import BuildProgress
from ..search.index import EXAMPLES, RECALL, SKIPPED
from ..search.slot import Slot, open_slots
from ..stopping import Stop
from ..store.files import json_bytes
from ..store.folders import FileFacts, Folder, facts_of
from ..store.generation import ARRAYS, ROW_AXES, Generation, Skipped
from ..store.manifest import Manifest, Part
from ..store.output import write_table
from ..store.row_table import ROWS, write_row_table

RECALL_QUERIES, RECALL_K = 16, 10
ROWS_OF_A_QUERY = 8


def finished_part(
    folder: Folder,
    name: str,
    generation: Generation,
    examples: pa.Table,
    *,
    sketching: Sequence[dict[str, Any]],
    bars: BuildProgress,
    stop: Stop,
) -> Part:
    """Builds what search needs from the stored blocks. Begun again, it starts over.

    Args:
        folder: the index's.
        name: of the part.
        generation: with all blocks written.
        examples: their ids, descriptions and metadata.
        sketching: how each parameter was sketched, for the manifest.
        bars: for progress.
        stop: looked at after each FAISS index.

    Raises:
        StoppedError: a signal asked it to stop.
    """
    files = {EXAMPLES: write_table(generation.folder, EXAMPLES, examples)}
    files[ROWS] = write_row_table(generation)
    slots = open_slots(generation, files)
    bars.begin("indexing steps", len(slots))
    recalls: dict[str, float] = {}
    for step, slot in slots.items():
        built = slot.build()
        files |= built
        recalls["total" if step is None else str(step)] = _recall(slot)
        slot.unload()
        bars.advance()
        stop.raise_if_asked(
            f"stopped as asked: all examples are stored in {folder}; run the same command, which indexes them and is "
            "done"
        )
    entries = generation.finished().values()
    skipped = [each for entry in entries for each in entry.skipped]
    files[RECALL] = _write_recall(generation.folder, recalls)
    files[SKIPPED] = write_table(generation.folder, SKIPPED, _skipped_table(examples, skipped))
    described = [f"{ARRAYS}/zarr.json", *(f"{ARRAYS}/{array}/zarr.json" for array in ROW_AXES)]
    generation.folder.make_durable(described)
    files |= {file: facts_of(generation.folder.read(file)) for file in described}
    silent = [set(entry.steps_without_gradient) for entry in entries if len(entry.skipped) < entry.num_rows]
    sums = np.sum([entry.loss_sums for entry in entries], axis=0)
    return Part(
        folder=name,
        plan=generation.plan,
        steps_without_gradient=tuple(sorted(set.intersection(*silent))) if silent else (),
        mean_losses=tuple((sums / max(1, generation.plan.num_examples - len(skipped))).tolist()),
        num_skipped=len(skipped),
        sketching=tuple(sketching),
        files={f"{name}/{file}": facts for file, facts in files.items()},
    )


def publish(
    folder: Folder,
    parts: Sequence[Part],
    confirm: Callable[[], None],
    *,
    deleted: str | None = None,
    files: Mapping[str, FileFacts] = MappingProxyType({}),
) -> None:
    """Publishes these parts as the index's next generation.

    Args:
        folder: the index's.
        parts: all of them.
        confirm: that the lock is still held (lock.py).
        deleted: as in the manifest.
        files: as in the manifest.
    """
    kept = Manifest.kept(folder)
    manifest = Manifest(
        generation=max(kept, default=0) + 1,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        parts=tuple(parts),
        deleted=deleted,
        files=dict(files),
    )
    confirm()
    manifest.write(folder)


def _write_recall(folder: Folder, recalls: dict[str, float]) -> FileFacts:
    content = json_bytes(
        {
            f"recall@{RECALL_K}": float(np.mean(list(recalls.values()))),
            "by_slot": recalls,
            "against": "a reading of every code",
            "queries": f"{RECALL_QUERIES} random combinations of {ROWS_OF_A_QUERY} stored rows, and their opposites",
        }
    )
    folder.write(RECALL, content)
    return facts_of(content)


def _skipped_table(examples: pa.Table, skipped: Sequence[Skipped]) -> pa.Table:
    """The skipped examples' rows, ids and reasons."""
    rows = pa.array([each.row for each in skipped], pa.int64())
    reasons = pa.array([each.reason for each in skipped], pa.string())
    return pa.table({"row": rows, "id": examples["id"].take(rows), "reason": reasons})


def _recall(slot: Slot) -> float:
    """The share of the k best rows, of both signs, that FAISS finds; equal scores count as found."""
    k = min(RECALL_K, len(slot.factors))
    queries = _queries(slot)
    queries = np.concatenate([queries, -queries])
    worst_best = slot.exact_search(queries, k)[:, -1]  # the k-th best score of each query
    found = [scores[:k] for _, scores in slot.search(queries, k, exact=False)]
    slack = 1e-5 * np.linalg.norm(queries, axis=1) * slot.norms.max(initial=0)
    hits = [(scores >= limit - eps).sum() for scores, limit, eps in zip(found, worst_best, slack, strict=True)]
    return float(np.sum(hits) / (k * len(queries)))


def _queries(slot: Slot) -> np.ndarray:
    """Random combinations of stored rows: a row by itself has only as many values as its code, a query has any."""
    rng = np.random.default_rng(0)
    rows = rng.integers(len(slot.factors), size=(RECALL_QUERIES, ROWS_OF_A_QUERY))
    decoded = slot.rows(rows.ravel()).reshape(*rows.shape, -1)  # [Q, rows, W]
    lengths = np.linalg.norm(decoded, axis=2, keepdims=True)
    weights = rng.standard_normal((*rows.shape, 1), dtype=np.float32) / np.maximum(lengths, 1e-30)
    return (decoded * weights).sum(1)
