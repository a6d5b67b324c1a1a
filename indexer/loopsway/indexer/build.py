"""The offline build: from a task to a published index, block by block, resumable.

A block of rows is sketched, rotated, coded and stored; its entry makes it done. After the last block come one FAISS
index for each step and the total, a measurement of their recall, and the manifest, whose atomic rename publishes the
index. The same command after a crash finishes what is missing.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet

from .blocks import BlockSketcher, NonFinite
from .changes import refuse_changed_results
from .config import SketchConfig
from .engines import Engine, LocalEngine
from .examples import code_digest, example_table, examples_digest
from .features import ExampleSketcher, ExampleSketches
from .files import SealError, read_sealed, write_sealed
from .index import EXAMPLES, Index, generation_folder, open_index
from .lock import writer_lock
from .manifest import MANIFEST, PLAN, IndexDamagedError, IndexExistsError, Manifest, Plan, checkpoint_digests
from .progress import BuildProgress
from .publication import publish
from .search import import_faiss
from .stopping import Stop, stop_on_signals
from .store import Generation
from .task import Task, TaskError

LEAST_BLOCK_ROWS, MOST_BLOCK_ROWS, LEAST_BLOCKS = 128, 2048, 16
_UNWRITABLE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
}


class StorageError(OSError):
    """The index's folder can't be written to."""


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
    progress: bool = True,
) -> Index:
    """Builds the index of a task's examples, or finishes a build that was cut.

    SIGINT and SIGTERM stop it after the block that is being sketched.

    Args:
        task: model, checkpoints and examples.
        path: the index's folder, `NAME.index`.
        config: of the sketches.
        task_spec: how the task was named, `path/to/file.py:ClassName`, kept in the index for those who serve it.
        task_arguments: its constructor's arguments, kept likewise.
        batch_size: examples in one forward and backward.
        block_rows: examples in a block, the unit of resumption and of storage. None: 2048, fewer for a small index.
        device: a torch device name.
        nonfinite: what to do with an example whose loss or gradient is not finite: "stop" the build, or "skip" the
            example, which is then in no answer, and is listed in the index's `skipped`.
        engine: "local", this process; or "ray", actors on a Ray cluster, which need `task_spec` and `task_arguments`
            to make the task, and reach `path` on a file system that they share with this process.
        workers: actors of engine "ray"; None: one for each GPU of the cluster, or CPU where there is none.
        address: of the Ray cluster; None: the one that runs here, or one that is started for the build.
        progress: whether to draw progress on the terminal.

    Returns:
        The index, open. A finished index of the same content is opened as it is.

    Raises:
        IndexExistsError: the path holds an index of something else, or one begun with other code, data or weights; the
            text names what differs.
        IndexLockedError: another process is writing to it.
        NonFiniteExampleError: an example is not finite, and `nonfinite` is "stop".
        StoppedError: a signal asked it to stop.
        StorageError: the disk is full, or can't be written to; what is stored stays.
        TaskError: what the task returned breaks its contract.
        ValueError: the model or its losses can't be attributed.
    """
    path = Path(path)
    import_faiss()  # fail before the work, not after it
    is_finished = (path / MANIFEST).exists()
    with _clear_storage_errors(path), nullcontext() if is_finished else writer_lock(path):
        examples = task.examples()
        if not len(examples):
            raise TaskError(f"{type(task).__name__}.examples() is empty; an index needs at least one example")
        sketcher = ExampleSketcher(task, config, device=device, batch_size=batch_size)
        table = example_table(task, len(examples))
        blocks = BlockSketcher(task, sketcher, nonfinite=nonfinite)
        probe = blocks.probe()
        plan = Plan(
            fingerprint=sketcher.fingerprint,
            task_spec=task_spec,
            task_arguments=dict(task_arguments or {}),
            loop=task.loop,
            config=sketcher.config,
            checkpoints=sketcher.checkpoints,
            parameters=sketcher.parameters,
            num_examples=len(examples),
            num_steps=probe.values.shape[1],
            examples_digest=examples_digest(task, examples, table["id"].to_pylist()),
            task_code=code_digest(task),
            checkpoint_digests=checkpoint_digests(sketcher.checkpoints),
            batch_size=batch_size,
            block_rows=block_rows or _block_rows(len(examples)),
        )
        if is_finished:
            _refuse_other_plan(path, Manifest.read(path).plan, plan, with_code=False)
            return open_index(path)
        generation = _begin(path, plan)
        sketcher.batch_size = generation.plan.batch_size
        chosen: Engine = LocalEngine(blocks)
        if engine == "ray":
            from .ray_engine import RayEngine  # here: it is an extra's

            chosen = RayEngine(
                task_spec, task_arguments or {}, device=device, nonfinite=nonfinite, workers=workers, address=address
            )
        with BuildProgress(shown=progress) as bars, stop_on_signals(bars.announce_stop) as stop:
            _sketch_blocks(path, generation, chosen, probe, bars, stop)
            pyarrow.parquet.write_table(table, generation.path / EXAMPLES)
            publish(path, generation, [entry.to_dict() for entry in sketcher.plan()], bars, stop)
    return open_index(path)


def _block_rows(num_examples: int) -> int:
    """A power of two: large blocks read fast, and a build that is cut loses at most one."""
    rows = LEAST_BLOCK_ROWS
    while rows < MOST_BLOCK_ROWS and rows * LEAST_BLOCKS < num_examples:
        rows *= 2
    return rows


def _begin(path: Path, plan: Plan) -> Generation:
    """The generation to build; a cut build's own, with its plan, to go on in the same batches."""
    folder = generation_folder(path, 1)
    folder.mkdir(parents=True, exist_ok=True)
    for partial in path.rglob("*.partial"):
        partial.unlink()
    try:
        begun = Plan.from_dict(read_sealed(folder / PLAN))
        _refuse_other_plan(path, begun, plan, with_code=True)
        plan = begun
    except FileNotFoundError:
        write_sealed(folder / PLAN, plan.to_dict())
    except (SealError, KeyError, TypeError) as error:
        raise IndexDamagedError(
            f"{folder / PLAN} is damaged: {error}; remove the index's folder and build again"
        ) from error
    generation = Generation(folder, plan)
    generation.create()
    return generation


def _refuse_other_plan(path: Path, existing: Plan, plan: Plan, *, with_code: bool) -> None:
    if differences := existing.differences(plan, with_code=with_code):
        raise IndexExistsError(
            f"{path} already holds an index of something else ({'; '.join(differences)[:2000]}); build to another "
            "path, or remove that folder"
        )


def _sketch_blocks(
    path: Path, generation: Generation, engine: Engine, probe: ExampleSketches, bars: BuildProgress, stop: Stop
) -> None:
    plan, finished = generation.plan, generation.finished()
    if 0 in finished:
        refuse_changed_results(path, generation, probe)
    done = sum(entry.num_rows for entry in finished.values())
    bars.begin(engine.title, plan.num_examples, done=done)
    missing = [block for block in range(plan.num_blocks) if block not in finished]
    with closing(engine.run(generation, missing, bars.advance)) as stored:
        for block in stored:
            done += len(plan.rows_of(block))
            stop.raise_if_asked(
                f"stopped as asked: {done:,} of {plan.num_examples:,} examples are stored in {path}; run the same "
                "command to go on"
            )


@contextmanager
def _clear_storage_errors(path: Path) -> Iterator[None]:
    """Says what a failed write means for the index."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        raise StorageError(
            error.errno,
            f"{_UNWRITABLE[error.errno]}: {path} could not be written to ({error}); finished blocks are kept: mend it, "
            "and run the same command to go on",
        ) from error
