"""The factors and norms of a part's rows in one file, so that opening an index maps them and reads none.

    rows.npy   float32 [2, S + 1, N]: factors, then norms; of each step, then of the total

They are the arrays of the store again, 8 bytes for a row of a kilobyte.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .files import file_digest
from .folders import FileFacts, IndexDamagedError
from .generation import SMALL_ARRAYS, Generation

ROWS = "rows.npy"


@dataclass(frozen=True, kw_only=True, eq=False)
class RowTable:
    """What decoding and standard errors need of each row.

    Attributes:
        factors: float32 [S + 1, N], of the codes.
        norms: float32 [S + 1, N], of the sketches.
    """

    factors: np.ndarray
    norms: np.ndarray


def write_row_table(generation: Generation) -> FileFacts:
    """Writes the table from the stored blocks; gives the file's size and digest."""
    return generation.folder.write_file(ROWS, lambda file: _write(generation, file))


def open_row_table(generation: Generation, files: Mapping[str, FileFacts]) -> RowTable:
    """Maps the table.

    Args:
        generation: whose it is.
        files: facts of the generation's files, by name.

    Raises:
        IndexDamagedError: it is not what was written.
    """
    folder, digest = generation.folder, files[ROWS]["digest"]
    with folder.local(ROWS, lambda: digest) as file:
        if file_digest(file) != digest:
            raise IndexDamagedError(f"{folder.at(ROWS)} is damaged: it does not match its digest; `loopsway verify`")
        # Plain arrays of the map: whatever cuts a memmap takes microseconds.
        factors, norms = np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        folder.keep(file, generation)
    return RowTable(factors=factors, norms=norms)


def _write(generation: Generation, file: Path) -> None:
    plan = generation.plan
    shape = (2, plan.num_steps + 1, plan.num_examples)
    table = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=shape)
    for block in range(plan.num_blocks):
        rows, arrays = plan.rows_of(block), generation.small_arrays(block)
        step_factors, total_factors, step_norms, total_norms = (arrays[name] for name in SMALL_ARRAYS)
        table[0, :, rows.start : rows.stop] = np.vstack([step_factors, total_factors])
        table[1, :, rows.start : rows.stop] = np.vstack([step_norms, total_norms])
    table.flush()
