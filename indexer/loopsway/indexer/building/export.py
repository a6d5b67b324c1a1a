"""Exports an index for other tools: sketches as float32 in Parquet or safetensors files, a bounded number of rows each.

    export.json              what was exported
    examples.parquet         id, description and metadata of each example
    sketches-00000.parquet   id, step (null: the total), norm, sketch [W]; a row for each example and step
    sketches-00000.safetensors   steps [n, S, W], total [n, W], step_norms [n, S], total_norms [n]; ids in its metadata

The rotation of coding.py is undone: the inner product with a query's sketch, as `ExampleSketcher` makes it, is the
influence that a search gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from safetensors.numpy import save_file

from ..search.contents import EXAMPLES
from ..search.index import Index, open_index
from ..store.addresses import open_folder
from ..store.files import json_bytes
from ..store.folders import Folder, clear_storage_errors
from ..store.output import begin_output, fill, write_table

ExportFormat = Literal["parquet", "safetensors"]

DESCRIPTION = "export.json"
SHARD_BYTES = 256 << 20  # of the sketches in a file


def export_index(
    path: str | Path, out: str | Path, *, format: ExportFormat = "parquet", progress: bool = True
) -> tuple[str, ...]:
    """Exports the sketches of an index, without deleted and skipped examples. Stopped and called again, it goes on.

    Args:
        path: the index's folder, or its URL.
        out: a folder, or URL, that is empty or holds the beginning of this export.
        format: of the files.
        progress: whether to draw progress on the terminal.

    Returns:
        Names of the files of sketches, in the examples' order.

    Raises:
        IndexNotFoundError, IndexDamagedError: as `open_index`.
        FileExistsError: `out` holds something else.
        StoppedError: a signal asked it to stop.
        StorageError: as `build_index`.
        ValueError: there is no such format.
    """
    if format not in _WRITERS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(_WRITERS)}")
    index, folder = open_index(path), open_folder(out)
    rows = index.sketched_rows()
    together = max(1, SHARD_BYTES // (4 * index.width * (index.num_steps + 1)))
    shards = [rows[start : start + together] for start in range(0, len(rows), together)]
    names = tuple(f"sketches-{shard:05d}.{format}" for shard in range(len(shards)))
    description = json_bytes(_description(index, len(rows), names))
    with clear_storage_errors(folder):
        begin_output(folder, DESCRIPTION, description)
        write_table(folder, EXAMPLES, index.examples.take(pa.array(rows)))

    def write(name: str, shard: np.ndarray) -> None:
        _write(folder, name, index, shard, _WRITERS[format])

    fill(folder, dict(zip(names, shards, strict=True)), write, doing="exporting examples", progress=progress)
    return names


def _description(index: Index, num_examples: int, names: Sequence[str]) -> dict[str, Any]:
    return {
        "index": index.name,
        "generation": index.generation,
        "created_at": index.created_at,
        "fingerprint": index.fingerprint,
        "config": index.config.to_dict(),
        "examples": num_examples,
        "slots": [*index.slots, "total"],
        "files": list(names),
    }


def _write(folder: Folder, name: str, index: Index, rows: np.ndarray, write: Callable[..., None]) -> None:
    ids = index.ids_in(rows)
    norms = np.vstack([index.step_norms()[:, rows], index.total_norms()[None, rows]]).T  # [n, S + 1]
    sketches = index.sketches(rows)
    folder.write_file(name, lambda file: write(file, ids, sketches, norms))


def _write_parquet(file: Path, ids: Sequence[str], sketches: np.ndarray, norms: np.ndarray) -> None:
    count, slots, width = sketches.shape
    steps = pa.array([*range(slots - 1), None] * count, pa.int32())
    table = {
        "id": pa.array(np.repeat(np.array(ids, dtype=object), slots), pa.string()),
        "step": steps,
        "norm": norms.ravel(),
        "sketch": pa.FixedSizeListArray.from_arrays(pa.array(sketches.ravel()), width),
    }
    pyarrow.parquet.write_table(pa.table(table), file, compression="none")  # sketches don't compress


def _write_safetensors(file: Path, ids: Sequence[str], sketches: np.ndarray, norms: np.ndarray) -> None:
    tensors = {
        "steps": sketches[:, :-1],
        "total": sketches[:, -1],
        "step_norms": norms[:, :-1],
        "total_norms": norms[:, -1],
    }
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    save_file(contiguous, file, metadata={"ids": json.dumps(list(ids))})


_WRITERS: dict[str, Callable[..., None]] = {"parquet": _write_parquet, "safetensors": _write_safetensors}
