"""The end of a build: FAISS indices, a measurement of their recall, and the manifest that publishes a generation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from .files import file_digest, sync, write_json
from .index import EXAMPLES, FAISS_FOLDER, RECALL, SKIPPED
from .manifest import FileFacts, Manifest, Part
from .progress import BuildProgress
from .search import Slot, open_slots
from .stopping import Stop
from .store import ARRAYS, Generation, Skipped

RECALL_QUERIES, RECALL_K = 16, 10
ROWS_OF_A_QUERY = 8


def finished_part(
    path: Path, generation: Generation, sketching: Sequence[dict[str, Any]], bars: BuildProgress, stop: Stop
) -> Part:
    """Builds what search needs from the stored blocks. Begun again, it starts over.

    Args:
        path: the index's folder.
        generation: with all blocks written and the examples' table beside them.
        sketching: how each parameter was sketched, for the manifest.
        bars: for progress.
        stop: looked at after each FAISS index.

    Raises:
        StoppedError: a signal asked it to stop.
    """
    folder = generation.path / FAISS_FOLDER
    folder.mkdir(exist_ok=True)
    slots = open_slots(generation)
    bars.begin("indexing steps", len(slots))
    recalls: dict[str, float] = {}
    for step, slot in slots.items():
        slot.build(folder)
        slot.load(folder)
        recalls["total" if step is None else str(step)] = _recall(slot)
        slot.unload()
        bars.advance()
        stop.raise_if_asked(
            f"stopped as asked: all examples are stored in {path}; run the same command, which indexes them and is done"
        )
    write_json(
        generation.path / RECALL,
        {
            f"recall@{RECALL_K}": float(np.mean(list(recalls.values()))),
            "by_slot": recalls,
            "against": "a reading of every code",
            "queries": f"{RECALL_QUERIES} random combinations of {ROWS_OF_A_QUERY} stored rows, and their opposites",
        },
    )
    entries = generation.finished().values()
    skipped = [each for entry in entries for each in entry.skipped]
    _write_skipped(generation, skipped)
    files = [generation.path / name for name in (EXAMPLES, SKIPPED, RECALL)]
    files += [*sorted(folder.glob("*.faiss")), *sorted((generation.path / ARRAYS).rglob("zarr.json"))]
    sync(folder)
    silent = [set(entry.steps_without_gradient) for entry in entries if len(entry.skipped) < entry.num_rows]
    sums = np.sum([entry.loss_sums for entry in entries], axis=0)
    return Part(
        folder=generation.path.relative_to(path).as_posix(),
        plan=generation.plan,
        steps_without_gradient=tuple(sorted(set.intersection(*silent))) if silent else (),
        mean_losses=tuple((sums / max(1, generation.plan.num_examples - len(skipped))).tolist()),
        num_skipped=len(skipped),
        sketching=tuple(sketching),
        files=file_facts(path, files),
    )


def file_facts(path: Path, files: Sequence[Path]) -> dict[str, FileFacts]:
    """Size and digest of files of the index in this folder, which are made durable."""
    for file in files:
        sync(file)
    return {
        file.relative_to(path).as_posix(): {"size_bytes": file.stat().st_size, "digest": file_digest(file)}
        for file in files
    }


def publish(path: Path, parts: Sequence[Part], deleted: Path | None = None) -> None:
    """Publishes these parts, without the deleted rows, as the index's next generation."""
    kept = Manifest.kept(path)
    Manifest(
        generation=max(kept, default=0) + 1,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        parts=tuple(parts),
        deleted=None if deleted is None else deleted.relative_to(path).as_posix(),
        files={} if deleted is None else file_facts(path, [deleted]),
    ).write(path)


def _write_skipped(generation: Generation, skipped: Sequence[Skipped]) -> None:
    """The skipped examples' rows, ids and reasons."""
    rows = pa.array([each.row for each in skipped], pa.int64())
    ids = pyarrow.parquet.read_table(generation.path / EXAMPLES, columns=["id"])["id"].take(rows)
    reasons = pa.array([each.reason for each in skipped], pa.string())
    pyarrow.parquet.write_table(pa.table({"row": rows, "id": ids, "reason": reasons}), generation.path / SKIPPED)


def _recall(slot: Slot) -> float:
    """The share of the k best rows, of both signs, that the search finds; equal scores count as found."""
    k = min(RECALL_K, len(slot.factors))
    queries = _queries(slot)
    queries = np.concatenate([queries, -queries])
    worst_best = slot.exact_search(queries, k)[:, -1]  # the k-th best score of each query
    found = [scores[:k] for _, scores in slot.search(queries, k)]
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
