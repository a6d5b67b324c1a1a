"""The end of a build: FAISS indices, what they find (recall.py), and the manifest that publishes a generation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from ..config import Approximation
from ..progress import BuildProgress
from ..search.contents import EXAMPLES, RECALL, SKIPPED
from ..search.slot import open_slots
from ..stopping import Stop
from ..store.entries import Skipped
from ..store.files import json_bytes
from ..store.folders import FileFacts, Folder, facts_of
from ..store.generation import ARRAYS, ROW_AXES, Generation
from ..store.manifest import Manifest, Part
from ..store.output import write_table
from ..store.row_table import ROWS, write_row_table
from .recall import Measured, measured, recall_document, refuse_low


def finished_part(
    folder: Folder,
    name: str,
    generation: Generation,
    examples: pa.Table,
    *,
    sketching: Sequence[dict[str, Any]],
    bars: BuildProgress,
    stop: Stop,
    approximation: Approximation | None = None,
    given_queries: np.ndarray | None = None,
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
        approximation: of the FAISS indices; None: the default.
        given_queries: rotated, as `recall.measured` takes them.

    Raises:
        RecallError: a FAISS index finds too little.
        StoppedError: a signal asked it to stop.
    """
    approximation = approximation or Approximation()
    files = {EXAMPLES: write_table(generation.folder, EXAMPLES, examples)}
    files[ROWS] = write_row_table(generation)
    slots = open_slots(generation, files, factory=approximation.factory)
    bars.begin("indexing steps", len(slots))
    recalls: dict[int | None, Measured] = {}
    for step, slot in slots.items():
        built = slot.build()
        files |= built
        recalls[step] = measured(slot, approximation, given_queries, generation.plan.num_steps)
        refuse_low(slot, approximation, recalls[step])
        slot.unload()
        bars.advance()
        stop.raise_if_asked(
            f"stopped as asked: all examples are stored in {folder}; run the same command, which indexes them and is "
            "done"
        )
    entries = generation.finished().values()
    skipped = [each for entry in entries for each in entry.skipped]
    content = json_bytes(recall_document(recalls, approximation))
    generation.folder.write(RECALL, content)
    files[RECALL] = facts_of(content)
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
        approximation=approximation,
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


def _skipped_table(examples: pa.Table, skipped: Sequence[Skipped]) -> pa.Table:
    """The skipped examples' rows, ids and reasons."""
    rows = pa.array([each.row for each in skipped], pa.int64())
    reasons = pa.array([each.reason for each in skipped], pa.string())
    return pa.table({"row": rows, "id": examples["id"].take(rows), "reason": reasons})
