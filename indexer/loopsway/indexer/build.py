"""The offline build: from a task to a published index, block by block, resumable.

A block of rows is sketched, rotated, coded and stored; its line in the block log makes it done. After the last block
come one FAISS index for each step and the total, a measurement of their recall, and the manifest, whose atomic rename
publishes the index. The same command after a crash finishes what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from .coding import code_examples
from .config import SketchConfig
from .features import ExampleSketcher
from .files import write_json
from .index import EXAMPLES, Index, generation_folder, open_index
from .manifest import MANIFEST, IndexDamagedError, IndexExistsError, Manifest, Plan, checkpoint_digests
from .progress import BuildProgress
from .publication import publish
from .search import import_faiss
from .store import CodedExamples, Generation
from .task import Task, TaskError

PLAN = "plan.json"
LEAST_BLOCK_ROWS, MOST_BLOCK_ROWS, LEAST_BLOCKS = 128, 2048, 16


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
    progress: bool = True,
) -> Index:
    """Builds the index of a task's examples, or finishes a build that was cut.

    Args:
        task: model, checkpoints and examples.
        path: the index's folder, `NAME.index`.
        config: of the sketches.
        task_spec: how the task was named, `path/to/file.py:ClassName`, kept in the index for those who serve it.
        task_arguments: its constructor's arguments, kept likewise.
        batch_size: examples in one forward and backward.
        block_rows: examples in a block, the unit of resumption and of storage. None: 2048, fewer for a small index.
        device: a torch device name.
        progress: whether to draw progress on the terminal.

    Returns:
        The index, open. A finished index of the same content is opened as it is.

    Raises:
        IndexExistsError: the path holds an index of something else; the text names what differs.
        TaskError: what the task returned breaks its contract.
        ValueError: the model or its losses can't be attributed.
    """
    path = Path(path)
    import_faiss()  # fail before the work, not after it
    examples = task.examples()
    if not len(examples):
        raise TaskError(f"{type(task).__name__}.examples() is empty; an index needs at least one example")
    sketcher = ExampleSketcher(task, config, device=device, batch_size=batch_size)
    table = _example_table(task, len(examples))
    plan = _plan(
        task,
        sketcher,
        table,
        examples,
        task_spec=task_spec,
        task_arguments=dict(task_arguments or {}),
        batch_size=batch_size,
        block_rows=block_rows or _block_rows(len(examples)),
    )
    if (path / MANIFEST).exists():
        _refuse_other_plan(path, Manifest.read(path).plan, plan)
        return open_index(path)
    folder, plan = _begin(path, plan)
    generation = Generation(folder, plan)
    generation.create()
    with BuildProgress(shown=progress) as bars:
        _sketch_blocks(generation, sketcher, examples, bars)
        pyarrow.parquet.write_table(table, folder / EXAMPLES)
        publish(path, generation, [entry.to_dict() for entry in sketcher.plan()], bars)
    return open_index(path)


def _plan(task: Task, sketcher: ExampleSketcher, table: pa.Table, examples: Sequence[Any], **kept: Any) -> Plan:
    """The plan of this build; `kept` are the fields that the caller chose."""
    probe = sketcher.sketch([examples[row] for row in range(min(2, len(examples)))])
    ids = hashlib.blake2b("\0".join(table["id"].to_pylist()).encode(), digest_size=16).hexdigest()
    return Plan(
        fingerprint=sketcher.fingerprint,
        loop=task.loop,
        config=sketcher.config,
        checkpoints=sketcher.checkpoints,
        parameters=sketcher.parameters,
        num_examples=len(examples),
        num_steps=probe.values.shape[1],
        examples_digest=ids,
        checkpoint_digests=checkpoint_digests(sketcher.checkpoints),
        **kept,
    )


def _block_rows(num_examples: int) -> int:
    """A power of two: large blocks read fast, and a build that is cut loses at most one."""
    rows = LEAST_BLOCK_ROWS
    while rows < MOST_BLOCK_ROWS and rows * LEAST_BLOCKS < num_examples:
        rows *= 2
    return rows


def _begin(path: Path, plan: Plan) -> tuple[Path, Plan]:
    """The folder of the generation to build, and its plan: a cut build's own, to go on in the same batches."""
    folder = generation_folder(path, 1)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / PLAN).exists():
        write_json(folder / PLAN, plan.to_dict())
        return folder, plan
    begun = _read_plan(folder / PLAN)
    _refuse_other_plan(path, begun, plan)
    for partial in folder.rglob("*.partial"):
        partial.unlink()
    return folder, begun


def _refuse_other_plan(path: Path, existing: Plan, plan: Plan) -> None:
    if differences := existing.differences(plan):
        raise IndexExistsError(
            f"{path} already holds an index of something else ({'; '.join(differences)[:2000]}); build to another "
            "path, or remove that folder"
        )


def _read_plan(file: Path) -> Plan:
    try:
        return Plan.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError) as error:
        raise IndexDamagedError(f"{file} is damaged: {error}; remove the index's folder and build again") from error


def _sketch_blocks(
    generation: Generation, sketcher: ExampleSketcher, examples: Sequence[Any], bars: BuildProgress
) -> None:
    plan, finished = generation.plan, generation.finished()
    sketcher.batch_size = plan.batch_size
    done = sum(entry.num_rows for entry in finished.values())
    bars.begin("sketching examples", plan.num_examples, done=done)
    for block in range(plan.num_blocks):
        if block in finished:
            continue
        parts = []
        rows = plan.rows_of(block)
        for start in range(rows.start, rows.stop, plan.batch_size):
            batch = range(start, min(start + plan.batch_size, rows.stop))
            parts.append(_coded_batch(sketcher, [examples[row] for row in batch], plan, start))
            bars.advance(len(batch))
        generation.write(block, CodedExamples.joined(parts))


def _coded_batch(sketcher: ExampleSketcher, batch: list[Any], plan: Plan, start: int) -> CodedExamples:
    sketches = sketcher.sketch(batch)
    if sketches.values.shape[1] != plan.num_steps:
        raise ValueError(
            f"the examples from row {start} ran {sketches.values.shape[1]} steps, the first ones ran "
            f"{plan.num_steps}: all examples of an index must run the same number; fix the task's loop count"
        )
    steps, total = code_examples(sketches.values, seed=plan.config.seed, bits=plan.config.bits)
    return CodedExamples(
        steps=steps,
        total=total,
        losses=sketches.losses.numpy(),
        steps_without_gradient=sketches.steps_without_gradient,
    )


def _example_table(task: Task, count: int) -> pa.Table:
    """Ids, descriptions and metadata of all examples.

    Raises:
        TaskError: two examples share an id, or what the task returned can't be a column.
    """
    ids = [task.example_id(row) for row in range(count)]
    if len(set(ids)) < count:
        twice = next(example_id for example_id, times in Counter(ids).items() if times > 1)
        rows = [row for row, example_id in enumerate(ids) if example_id == twice]
        raise TaskError(f"example id {twice!r} is that of rows {rows[:8]}; example_id must give each row its own")
    columns: dict[str, Any] = {"id": ids, "description": [task.describe(row) for row in range(count)]}
    if task.metadata(0):
        columns["metadata"] = [dict(task.metadata(row)) for row in range(count)]
    schema = {"id": pa.string(), "description": pa.string(), "metadata": None}
    try:
        return pa.table({name: pa.array(values, schema[name]) for name, values in columns.items()})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise TaskError(
            f"the examples' {', '.join(columns)} can't be stored: {error}; example_id and describe must return text, "
            "and each column of metadata values of one type (str, int, float, bool, or None)"
        ) from error
