"""All pairs of training examples whose gradients are nearly the same, as Parquet files in a folder.

duplicates.json              what was compared
duplicates-00000.parquet     id, other_id, cosine, standard_error
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ..search.index import Index, open_index
from ..search.similarity import cosines
from ..store.addresses import open_folder
from ..store.files import json_bytes
from ..store.folders import clear_storage_errors
from ..store.output import begin_output, fill, write_table
from .neighbors import TOGETHER, check_step

DESCRIPTION = "duplicates.json"
SHARD_ROWS = 16 * TOGETHER  # examples whose pairs are in a file


def find_duplicates(
    index: Index | str | Path,
    out: str | Path,
    *,
    threshold: float = 0.95,
    step: int | None = None,
    progress: bool = True,
) -> tuple[int, tuple[str, ...]]:
    """All pairs of examples whose gradients have at least this cosine. Stopped and called again, it goes on.

    It compares each example with all: N^2 W bit operations for sign bits.

    Args:
        index: open, or its path.
        out: a folder, or URL, that is empty or holds the beginning of this job.
        threshold: the least cosine, above 0 and at most 1.
        step: of the loop; None: the gradients summed over steps.
        progress: whether to draw progress on the terminal.

    Returns:
        How many pairs there are, and the names of the files of pairs.

    Raises:
        FileExistsError, StoppedError, IndexNotFoundError, IndexDamagedError, StorageError: as `score_examples`.
        ValueError: the threshold or step.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}, expected a cosine above 0 and at most 1")
    index = index if isinstance(index, Index) else open_index(index)
    check_step(index, step)
    folder, rows = open_folder(out), index.sketched_rows()
    starts = range(0, len(rows), SHARD_ROWS)
    parts = {f"duplicates-{number:05d}.parquet": rows[start:][:SHARD_ROWS] for number, start in enumerate(starts)}
    description = {
        **{"index": index.name, "generation": index.generation, "created_at": index.created_at},
        **{"fingerprint": index.fingerprint, "threshold": threshold, "step": step},
    }
    with clear_storage_errors(folder):
        begin_output(folder, DESCRIPTION, json_bytes(description))

    def write(name: str, shard: np.ndarray) -> None:
        groups = range(0, len(shard), TOGETHER)
        pairs = [_pairs(index, step, shard[start : start + TOGETHER], rows, threshold) for start in groups]
        write_table(folder, name, pa.concat_tables(pairs))

    fill(folder, parts, write, doing="comparing examples", progress=progress)
    counts = [pyarrow.parquet.read_metadata(pa.BufferReader(folder.read(name))).num_rows for name in parts]
    return sum(counts), tuple(parts)


def _pairs(index: Index, step: int | None, own: np.ndarray, rows: np.ndarray, threshold: float) -> pa.Table:
    """Pairs of these rows with later ones."""
    agreement = index.codes.compared(step, own)
    similarity, errors = cosines(agreement, index.bits, index.width)
    later = rows[None, :] > own[:, None]
    mine, others = np.nonzero(later & (similarity[:, rows] >= threshold))
    ids, others = index.examples["id"], rows[others]
    return pa.table(
        {
            "id": ids.take(pa.array(own[mine])),
            "other_id": ids.take(pa.array(others)),
            "cosine": similarity[mine, others],
            "standard_error": errors[mine, others],
        }
    )
