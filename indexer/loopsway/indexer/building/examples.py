"""A task's examples as a table, and what tells whether they, or the task's code, have changed since a build began."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..config import Checkpoint
from ..store.files import file_digest
from ..task import Task, TaskError


class SubsetTask(Task):
    """Some rows of a task's examples; all else is the task's.

    Args:
        task: the whole.
        rows: which, in their new order.
    """

    def __init__(self, task: Task, rows: Sequence[int]) -> None:
        self.task, self.rows, self._all = task, list(rows), task.examples()
        self.loop = task.loop

    def checkpoints(self) -> Sequence[Checkpoint]:
        return self.task.checkpoints()

    def model(self, checkpoint: Checkpoint) -> torch.nn.Module:
        return self.task.model(checkpoint)

    def second_moments(self, checkpoint: Checkpoint) -> Mapping[str, Tensor] | None:
        return self.task.second_moments(checkpoint)

    def examples(self) -> Sequence[Any]:
        return _Chosen(self._all, self.rows)

    def collate(self, examples: Sequence[Any]) -> Any:
        return self.task.collate(examples)

    def losses(self, model: torch.nn.Module, batch: Any) -> Tensor:
        return self.task.losses(model, batch)

    def example_id(self, row: int) -> str:
        return self.task.example_id(self.rows[row])

    def metadata(self, row: int) -> Mapping[str, Any]:
        return self.task.metadata(self.rows[row])

    def describe(self, row: int) -> str:
        return self.task.describe(self.rows[row])


class _Chosen(Sequence[Any]):
    """Chosen items, read when they are asked for."""

    def __init__(self, items: Sequence[Any], rows: Sequence[int]) -> None:
        self._items, self._rows = items, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: Any) -> Any:
        return self._items[self._rows[row]]


def example_table(task: Task, count: int) -> pa.Table:
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


def examples_digest(task: Task, examples: Sequence[Any], ids: Sequence[str]) -> str:
    """Of all examples in order: their ids, and the batch that `collate` makes of each one alone.

    Whatever `collate` raises is passed on, with a note that names the example.
    """
    digest = hashlib.blake2b(digest_size=16)
    for row, example_id in enumerate(ids):
        digest.update(example_id.encode() + b"\0")
        try:
            batch = task.collate([examples[row]])
        except Exception as error:
            error.add_note(f"collate raised this for example {example_id!r} (row {row}) alone")
            raise
        _update(digest, batch)
    return digest.hexdigest()


def code_digest(task: Task) -> str:
    """Of the files that define the task's class and those that it derives from, but for Loopsway's own `Task`."""
    if isinstance(task, SubsetTask):
        return code_digest(task.task)
    files = set()
    for cls in type(task).__mro__:
        if cls not in (Task, *Task.__mro__):
            try:
                files.add(inspect.getsourcefile(cls))
            except TypeError:  # made in an interpreter: it has no file
                continue
    digests = sorted(file_digest(Path(file)) for file in files if file is not None and Path(file).is_file())
    return hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()


def _update(digest: Any, value: Any) -> None:
    """Takes in a batch: tensors, arrays and plain values, in mappings, sequences and objects with attributes."""
    match value:
        case Tensor():
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        case np.ndarray():
            digest.update(f"{value.dtype}{value.shape}".encode())
            digest.update(np.ascontiguousarray(value).data)
        case Mapping():
            for key in value:
                digest.update(f"{key!r}:".encode())
                _update(digest, value[key])
        case list() | tuple():
            digest.update(f"{len(value)}[".encode())
            for each in value:
                _update(digest, each)
        case _ if hasattr(value, "__dict__"):
            _update(digest, vars(value))
        case _:
            digest.update(f"{value!r};".encode())
