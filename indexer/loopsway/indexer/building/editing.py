"""Changes to a published index that need no model: deleting, compacting and pruning.

Each makes a new generation; readers that have an earlier one open go on with it, until it is pruned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..progress import BuildProgress
from ..search.filters import matching_rows
from ..search.index import Index, open_index
from ..search.shards import shard_rows
from ..sketches.coding import Codes, row_bytes
from ..stopping import stop_on_signals
from ..store.addresses import open_folder
from ..store.entries import CodedExamples
from ..store.folders import Folder, clear_storage_errors
from ..store.generation import Generation
from ..store.lock import writer_lock
from ..store.manifest import PLAN, Manifest, Plan, history_file
from ..store.output import write_table
from ..store.parts import kept_parts, new_part_name, part_names, remove_partial_files, unfinished_part
from ..store.sealed import read_sealed, write_sealed
from .publication import finished_part, publish

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
    folder = open_folder(path)
    if (ids is None) == (where is None):
        raise ValueError("give either ids or where: which examples are to be deleted")
    Manifest.read(folder)  # where there is no index, nothing is made
    with clear_storage_errors(folder), writer_lock(folder) as confirm:
        index = open_index(path)
        rows = (
            _live_matches(index, where)
            if where is not None
            else [index.row_of(each) for each in dict.fromkeys(ids or ())]
        )
        if not len(rows):
            return 0
        if len(rows) == index.num_examples:
            raise ValueError(f"that would delete all {len(rows):,} examples of {folder}; remove the folder instead")
        gone = np.union1d(np.setdiff1d(np.arange(index.num_rows), index.live_rows()), rows)
        table = pa.table({"row": gone, "id": index.examples["id"].take(pa.array(gone))})
        name = f"{new_part_name(folder)}/{DELETED}"
        publish(folder, index.manifest.parts, confirm, deleted=name, files={name: write_table(folder, name, table)})
    return len(rows)


def _live_matches(index: Index, where: str) -> np.ndarray:
    return np.intersect1d(np.flatnonzero(matching_rows(index.examples, where)), index.live_rows())


def compact_index(path: str | Path, *, progress: bool = True) -> Index:
    """Rewrites an index as one part, without its deleted and skipped rows.

    Cut at any moment and called again, it goes on where it was. The parts that it replaces stay on disk for readers of
    earlier generations, until `prune_index`.

    Returns:
        The index, open. One that has nothing to compact is opened as it is.

    Raises:
        RecallError: the index's FAISS factory doesn't find what its recall floor says in the rewritten part.
        IndexLockedError, StoppedError, StorageError: as `build_index`.
    """
    folder = open_folder(path)
    Manifest.read(folder)  # where there is no index, nothing is made
    with clear_storage_errors(folder), writer_lock(folder) as confirm:
        index = open_index(path)
        skipped = [index.row_of(each) for each in index.skipped]
        rows = np.setdiff1d(index.live_rows(), skipped)
        if len(index.manifest.parts) == 1 and len(rows) == index.num_rows:
            return index
        name, generation = _begin_compaction(folder, index, rows)
        with BuildProgress(shown=progress) as bars, stop_on_signals(bars.announce_stop) as stop:
            finished = generation.finished()
            bars.begin("copying blocks", generation.plan.num_blocks, done=len(finished))
            for block in range(generation.plan.num_blocks):
                if block not in finished:
                    chosen = generation.plan.rows_of(block)
                    generation.write(block, _copied(index, rows[chosen.start : chosen.stop]))
                    bars.advance()
                    stop.raise_if_asked(f"stopped as asked: {folder} is as it was; compact it again to go on")
            examples = index.examples.take(pa.array(rows))
            part = finished_part(
                folder,
                name,
                generation,
                examples,
                sketching=index.plan,
                bars=bars,
                stop=stop,
                approximation=index.approximation,
            )
            publish(folder, [part], confirm)
    return open_index(path)


def _begin_compaction(folder: Folder, index: Index, rows: np.ndarray) -> tuple[str, Generation]:
    """The part to write, and its name; a begun part of something else is left alone."""
    remove_partial_files(folder)
    facts = f"{index.generation} {index.created_at} {rows.tobytes().hex()}"
    digest = "compacted " + hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()
    plan, size = index.manifest.plan, row_bytes(index.width, index.bits)
    shards = shard_rows(len(rows), size, plan.block_rows)
    plan = replace(plan, num_examples=len(rows), examples_digest=digest, shard_rows=shards)
    name = unfinished_part(folder)
    if name is None or Plan.from_dict(read_sealed(folder / name, PLAN)) != plan:
        name = new_part_name(folder)
        write_sealed(folder / name, PLAN, plan.to_dict())
    generation = Generation(folder / name, plan)
    generation.create()
    return name, generation


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
        parts: their names.
        size_bytes: of all files.
    """

    generations: tuple[int, ...]
    parts: tuple[str, ...]
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
    folder = open_folder(path)
    if keep < 1:
        raise ValueError(f"keep is {keep}, expected at least 1: the last generation always stays")
    open_index(path)
    with clear_storage_errors(folder), writer_lock(folder) as confirm:
        kept = Manifest.kept(folder)
        gone, staying = kept[:-keep], kept[-keep:]
        read = kept_parts(folder, staying)
        parts = [name for name in part_names(folder) if name not in read]
        files = [file for name in parts for file in folder.files(name)]
        size = sum(size or 0 for size in folder.sizes(files).values())
        confirm()
        folder.remove(map(history_file, gone))
        for name in parts:
            folder.remove_folder(name)
    return Pruned(generations=tuple(gone), parts=tuple(parts), size_bytes=size)
