"""The offline build: from a task to a published index, and from more examples to its next generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from ..config import Approximation, SketchConfig
from ..search.faiss_index import import_faiss
from ..search.index import Index, open_index
from ..store.addresses import open_folder
from ..store.folders import Folder, clear_storage_errors
from ..store.lock import writer_lock
from ..store.manifest import IndexExistsError, Manifest, Plan, is_published
from ..task import Task, TaskError
from .blocks import NonFinite
from .examples import SubsetTask
from .part import PartBuilder
from .publication import publish


def build_index(
    task: Task,
    path: str | Path,
    config: SketchConfig | None = None,
    *,
    task_spec: str | None = None,
    task_arguments: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    block_rows: int | None = None,
    device: str = "cpu",
    nonfinite: NonFinite = "stop",
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    address: str | None = None,
    faiss: str | None = None,
    recall_floor: float = Approximation.recall_floor,
    recall_queries: np.ndarray | None = None,
    progress: bool = True,
) -> Index:
    """Builds the index of a task's examples, or finishes a build that was cut.

    SIGINT and SIGTERM stop it after the block that is being sketched.

    Args:
        task: model, checkpoints and examples.
        path: the index's folder, `NAME.index`; or its URL in an object store, `s3://bucket/NAME.index`.
        config: of the sketches.
        task_spec: how the task was named, `path/to/file.py:ClassName`, kept in the index for those who serve it.
        task_arguments: its constructor's arguments, kept likewise.
        batch_size: examples in one forward and backward.
        block_rows: examples in a block, the unit of resumption and of storage. None: 2048, fewer for a small index.
        device: a torch device name.
        nonfinite: what to do with an example whose loss or gradient is not finite: "stop" the build, or "skip" the
            example, which is then in no answer, and is listed in the index's `skipped`.
        engine: "local", this process; or "ray", actors on a Ray cluster, which need `task_spec` and `task_arguments`
            to make the task, and reach `path` on a file system or object store that they share with this process.
        workers: actors of engine "ray"; None: one for each GPU of the cluster, or CPU where there is none.
        address: of the Ray cluster; None: that of RAY_ADDRESS, or one that is started for the build.
        faiss: factory string of the FAISS indices that approximate searches (`exact=False`) use, such as "IVF256,SQ8".
            None: an exhaustive kind that fits the bits. A part, or the end of one, that is too small to train them
            takes that too.
        recall_floor: the least recall@10, of proponents and of opponents, that they must have at every step, from 0 to
            1; `recall` of the index says what was measured, and the effort that it took.
        recall_queries: sketches of real queries to measure it on beside held-out rows, float32 [Q, T, W], made with
            this config.
        progress: whether to draw progress on the terminal.

    Returns:
        The index, open. A finished index of the same content is opened as it is.

    Raises:
        IndexExistsError: the path holds an index of something else, or one begun with other code, data or weights; the
            text names what differs.
        IndexLockedError: another process is writing to it.
        NonFiniteExampleError: an example is not finite, and `nonfinite` is "stop".
        RecallError: the FAISS indices find less than `recall_floor` at any effort. Nothing is published, and all
            sketches are kept: the same build with another `faiss` or floor goes on with them.
        StoppedError: a signal asked it to stop.
        StorageError: the disk is full, or can't be written to; what is stored stays.
        TaskError: what the task returned breaks its contract.
        ValueError: the model or its losses can't be attributed; or, before anything is sketched, `faiss`,
            `recall_floor` or `recall_queries` can't be used.
    """
    folder, approximation = open_folder(path), Approximation(factory=faiss, recall_floor=recall_floor)
    import_faiss()  # fail before the work, not after it
    is_finished = is_published(folder)
    with clear_storage_errors(folder), nullcontext(lambda: None) if is_finished else writer_lock(folder) as confirm:
        builder = PartBuilder(
            task,
            config,
            task_spec=task_spec,
            task_arguments=task_arguments,
            batch_size=batch_size,
            block_rows=block_rows,
            device=device,
            nonfinite=nonfinite,
            engine=engine,
            workers=workers,
            address=address,
            progress=progress,
            approximation=approximation,
            recall_queries=recall_queries,
        )
        if is_finished:
            manifest = Manifest.read(folder)
            _refuse_other_plan(folder, manifest.plan, builder.plan, ignoring=["task_code"])
            _refuse_other_factory(folder, manifest.parts[0].approximation, approximation)
        else:
            publish(folder, [builder.build(folder)], confirm)
    return open_index(path)


def add_examples(
    task: Task,
    path: str | Path,
    *,
    skip_existing: bool = False,
    task_spec: str | None = None,
    task_arguments: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    block_rows: int | None = None,
    device: str = "cpu",
    nonfinite: NonFinite = "stop",
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    address: str | None = None,
    progress: bool = True,
) -> Index:
    """Adds a task's examples to an index, as its next generation; nothing that is there is rewritten.

    Cut at any moment and called again, it goes on where it was.

    Args:
        task: with the model and checkpoints of the index, and the examples to add.
        path: the index's folder.
        skip_existing: leave out examples whose ids the index has, as those of a file that has grown.
        task_spec: this argument and those after it are as in `build_index`.
        task_arguments: as there.
        batch_size: as there.
        block_rows: as there.
        device: as there.
        nonfinite: as there.
        engine: as there.
        workers: as there.
        address: as there.
        progress: as there.

    Returns:
        The index, open.

    Raises:
        IndexNotFoundError: there is no index at the path.
        IndexExistsError: the task's model, checkpoints or loop are not the index's, or another addition was begun; the
            text names what differs.
        TaskError: an id is in the index already, the metadata has other columns, or there is nothing to add.
        IndexLockedError, NonFiniteExampleError, RecallError, StoppedError, StorageError, ValueError: as `build_index`;
            the FAISS factory and the recall floor are the index's.
    """
    folder = open_folder(path)
    config = Manifest.read(folder).plan.config
    with clear_storage_errors(folder), writer_lock(folder) as confirm:
        index = open_index(path)
        rows = _new_rows(task, index, skip_existing=skip_existing)
        builder = PartBuilder(
            task if len(rows) == len(task.examples()) else SubsetTask(task, rows),
            config,
            task_spec=task_spec,
            task_arguments=task_arguments,
            batch_size=batch_size,
            block_rows=block_rows,
            device=device,
            nonfinite=nonfinite,
            engine=engine,
            workers=workers,
            address=address,
            progress=progress,
            approximation=index.approximation,
            is_addition=True,
        )
        _refuse_other_plan(
            folder, index.manifest.plan, builder.plan, ignoring=["task_code", "num_examples", "examples_digest"]
        )
        _refuse_other_columns(index, builder.table)
        part = builder.build(folder)
        deleted, files = index.manifest.deleted, index.manifest.files
        publish(folder, [*index.manifest.parts, part], confirm, deleted=deleted, files=files)
    return open_index(path)


def _refuse_other_plan(folder: Folder, existing: Plan, plan: Plan, *, ignoring: Sequence[str]) -> None:
    if differences := existing.differences(plan, ignoring=ignoring):
        raise IndexExistsError(
            f"{folder} already holds an index of something else ({'; '.join(differences)[:2000]}); build to another "
            "path, or remove that folder"
        )


def _refuse_other_factory(folder: Folder, existing: Approximation, asked: Approximation) -> None:
    if asked.factory not in (None, existing.factory):
        mine = "the default FAISS indices" if existing.factory is None else f"FAISS factory {existing.factory!r}"
        raise IndexExistsError(
            f"{folder} already holds this index, with {mine} and not {asked.factory!r}; build to another path, or "
            "remove that folder"
        )


def _new_rows(task: Task, index: Index, *, skip_existing: bool) -> list[int]:
    """Rows of the task's examples that the index has not."""
    ids = [task.example_id(row) for row in range(len(task.examples()))]
    known = set(index.ids_in(index.live_rows()))
    new = [row for row, example_id in enumerate(ids) if example_id not in known]
    if len(new) < len(ids) and not skip_existing:
        example_id = next(each for each in ids if each in known)
        raise TaskError(
            f"{len(ids) - len(new):,} of {len(ids):,} examples are in index {index.name} already, {example_id!r} for "
            "one; give others their own ids, delete those first, or leave them out with skip_existing=True "
            "(--skip-existing)"
        )
    if not new:
        raise TaskError(f"there is nothing to add: all {len(ids):,} examples of the task are in index {index.name}")
    return new


def _refuse_other_columns(index: Index, table: pa.Table) -> None:
    if table.schema != index.examples.schema:
        mine, theirs = (
            ", ".join(f"{field.name} {field.type}" for field in each.schema) for each in (table, index.examples)
        )
        raise TaskError(f"the examples have the columns {mine}; those of index {index.name} have {theirs}")
