"""Changes to a published index that need no model: deleting, compacting and pruning.

Each makes a new generation; readers that have an earlier one open go on with it, until it is pruned.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from .coding import Codes, row_bytes
from .files import read_sealed, write_sealed
from .filters import matching_rows
from .folders import (
    clear_storage_errors,
    kept_folders,
    new_part_folder,
    part_folders,
    remove_partial_files,
    unfinished_part,
)
from .index import EXAMPLES, Index, open_index
from .lock import writer_lock
from .manifest import HISTORY, PLAN, Manifest, Plan
from .progress import BuildProgress
from .publication import finished_part, publish
from .search import shard_rows
from .stopping import stop_on_signals
from .store import CodedExamples, Generation

DELETED = "deleted.parquet"


def delete_examples(path: str | Path, *, ids: Sequence[str] | None = None, where: str | None = None) -> int:
    """Deletes examples: no search finds them from the next generation on. Their bytes stay until `compact_index`.

    Args:
        path: the index's folder.
        ids: of the examples.
        where: a filter over their metadata (filters.py), in place of ids.

    Returns:
        How many were deleted; with none, no generation is made.

    Raises:
        UnknownExampleError: an id is not in the index.
        FilterError: the filter can't be read.
        ValueError: nothing would be left, or not just one of ids and where is given.
        IndexLockedError, StorageError: as `build_index`.
    """
    path = Path(path)
    if (ids is None) == (where is None):
        raise ValueError("give either ids or where: which examples are to be deleted")
    open_index(path)
    with clear_storage_errors(path), writer_lock(path):
        index = open_index(path)
        rows = (
            _live_matches(index, where)
            if where is not None
            else [index.row_of(each) for each in dict.fromkeys(ids or ())]
        )
        if not len(rows):
            return 0
        if len(rows) == index.num_examples:
            raise ValueError(f"that would delete all {len(rows):,} examples of {path}; remove the folder instead")
        gone = np.union1d(np.setdiff1d(np.arange(index.num_rows), index.live_rows()), rows)
        folder = new_part_folder(path)
        folder.mkdir(parents=True)
        table = pa.table({"row": gone, "id": index.examples["id"].take(pa.array(gone))})
        pyarrow.parquet.write_table(table, folder / DELETED)
        publish(path, index.manifest.parts, folder / DELETED)
    return len(rows)


def _live_matches(index: Index, where: str) -> np.ndarray:
    return np.intersect1d(np.flatnonzero(matching_rows(index.examples, where)), index.live_rows())


def compact_index(path: str | Path, *, progress: bool = True) -> Index:
    """Rewrites an index as one part, without its deleted and skipped rows.

    Cut at any moment and called again, it goes on where it was. The parts that it replaces stay on disk for readers of
    earlier generations, until `prune_index`.

    Returns:
        The index, open. One that has nothing to compact is opened as it is.
    """
    path = Path(path)
    open_index(path)
    with clear_storage_errors(path), writer_lock(path):
        index = open_index(path)
        skipped = [index.row_of(each) for each in index.skipped]
        rows = np.setdiff1d(index.live_rows(), skipped)
        if len(index.manifest.parts) == 1 and len(rows) == index.num_rows:
            return index
        generation = _begin_compaction(path, index, rows)
        with BuildProgress(shown=progress) as bars, stop_on_signals(bars.announce_stop) as stop:
            finished = generation.finished()
            bars.begin("copying blocks", generation.plan.num_blocks, done=len(finished))
            for block in range(generation.plan.num_blocks):
                if block not in finished:
                    chosen = generation.plan.rows_of(block)
                    generation.write(block, _copied(index, rows[chosen.start : chosen.stop]))
                    bars.advance()
                    stop.raise_if_asked(f"stopped as asked: {path} is as it was; compact it again to go on")
            pyarrow.parquet.write_table(index.examples.take(pa.array(rows)), generation.path / EXAMPLES)
            publish(path, [finished_part(path, generation, index.plan, bars, stop)])
    return open_index(path)


def _begin_compaction(path: Path, index: Index, rows: np.ndarray) -> Generation:
    """The part to write; a begun part of something else is left alone."""
    remove_partial_files(path)
    facts = f"{index.generation} {index.created_at} {rows.tobytes().hex()}"
    digest = "compacted " + hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
    plan, size = index.manifest.plan, row_bytes(index.width, index.bits)
    shards = shard_rows(len(rows), size, plan.block_rows)
    plan = replace(plan, num_examples=len(rows), examples_digest=digest, shard_rows=shards)
    folder = unfinished_part(path)
    if folder is None or Plan.from_dict(read_sealed(folder / PLAN)) != plan:
        folder = new_part_folder(path)
        folder.mkdir(parents=True)
        write_sealed(folder / PLAN, plan.to_dict())
    generation = Generation(folder, plan)
    generation.create()
    return generation


def _copied(index: Index, rows: np.ndarray) -> CodedExamples:
    """A block of stored rows as they are."""
    stored = index.stored_rows(rows)
    by_example: Callable[[str], np.ndarray] = lambda name: stored[name].swapaxes(0, 1)  # noqa: E731
    return CodedExamples(
        steps=Codes(
            codes=by_example("step_codes").reshape(-1, stored["step_codes"].shape[2]),
            factors=by_example("step_factors").ravel(),
            norms=by_example("step_norms").ravel(),
        ),
        total=Codes(codes=stored["total_codes"], factors=stored["total_factors"], norms=stored["total_norms"]),
        losses=stored["losses"],
        steps_without_gradient=index.steps_without_gradient,
    )


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What was removed.

    Attributes:
        generations: that can't be opened any more.
        folders: how many.
        size_bytes: of all files.
    """

    generations: tuple[int, ...]
    folders: int
    size_bytes: int


def prune_index(path: str | Path, *, keep: int = 1) -> Pruned:
    """Removes earlier generations, and parts that were begun and never finished.

    A reader that has a removed generation open may fail: close it before.

    Args:
        path: the index's folder.
        keep: how many of the last generations stay.

    Raises:
        ValueError: keep is less than 1.
        IndexLockedError, StorageError: as `build_index`.
    """
    path = Path(path)
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1: the last generation always stays")
    open_index(path)
    with clear_storage_errors(path), writer_lock(path):
        kept = Manifest.kept(path)
        gone, staying = kept[:-keep], kept[-keep:]
        folders = [folder for folder in part_folders(path) if folder not in kept_folders(path, staying)]
        size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
        for generation in gone:
            (path / HISTORY / f"{generation:06d}.json").unlink()
        for folder in folders:
            shutil.rmtree(folder)
    return Pruned(generations=tuple(gone), folders=len(folders), size_bytes=size)
