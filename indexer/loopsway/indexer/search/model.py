"""Whose model sketches the queries of an index: which task's code may run, and whether its model fits.

An index is data, and may come from anybody. The task that its manifest names runs by itself only when it is one of
Loopsway's own; any other is named by whoever asks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sketches.features import ExampleSketcher
from ..sketches.weights import WeightMemory
from ..task import Task, is_shipped, load_task
from .index import Index


class LoadError(ValueError):
    """An index's queries can't be sketched by this task; the text says what can."""


def load_sketcher(
    index: Index,
    task_spec: str | None = None,
    task_arguments: Mapping[str, Any] | None = None,
    *,
    device: str = "cpu",
    batch_size: int = 32,
    memory: WeightMemory | None = None,
) -> tuple[Task, ExampleSketcher]:
    """The task of an index, and what sketches its queries.

    Args:
        index: open.
        task_spec: the task to run, as `path/to/file.py:Class`. None: the one that the index names, if it is shipped.
        task_arguments: for the task's constructor. None: those that the index was built with.
        device: a torch device name.
        batch_size: examples in one forward and backward, at the most.
        memory: as `ExampleSketcher`'s.

    Raises:
        LoadError: the task may not run unasked, or its model makes other sketches than the index holds.
        TaskError: the task can't be loaded.
    """
    spec = allowed_task(index, task_spec)
    task = load_task(spec, index.task_arguments if task_arguments is None else task_arguments)
    sketcher = ExampleSketcher(task, index.config, device=device, batch_size=batch_size, memory=memory)
    if sketcher.fingerprint != index.fingerprint:
        raise LoadError(
            f"task {spec} makes sketches of fingerprint {sketcher.fingerprint}, index {index.path} holds "
            f"{index.fingerprint}: the task has other checkpoints, learning rates or loop parameters than the index "
            "was built from. Use the task it was built from, or rebuild the index"
        )
    if changed := index.changed_checkpoints(sketcher.checkpoints):
        raise LoadError(
            f"the weights of checkpoint {', '.join(changed)} of task {spec} are not those that index {index.path} was "
            "built from: use the task with its old files, or rebuild the index"
        )
    return task, sketcher


def allowed_task(index: Index, task_spec: str | None) -> str:
    """The task whose code may run for this index.

    Raises:
        LoadError: none is given, and the one that the index names is not shipped.
    """
    if task_spec is not None:
        return task_spec
    named = index.task_spec
    if named is None:
        raise LoadError(f"index {index.path} names no task: give --task path/to/file.py:Class")
    if not is_shipped(named):
        raise LoadError(
            f"index {index.path} names the task {named}, which is not one of Loopsway's own: its code only runs when "
            f"you name it, with --task {named}"
        )
    return named
