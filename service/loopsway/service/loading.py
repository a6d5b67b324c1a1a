"""From an index on disk to an engine that answers: which task's code may run, and whether its model fits the index.

An index is data, and may come from anybody. The task that its manifest names runs by itself only when it is one of
Loopsway's own; any other is named by whoever starts the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopsway.indexer import ExampleSketcher, Index, is_shipped, load_task, open_index

from .engine import Engine
from .model import QueryModel
from .settings import Settings


class LoadError(ValueError):
    """An index can't be served with this task; the text says what can."""


def load_engine(
    path: str | Path,
    task_spec: str | None = None,
    task_arguments: Mapping[str, Any] | None = None,
    *,
    model: bool = True,
    device: str = "cpu",
    settings: Settings | None = None,
) -> Engine:
    """Opens an index to be served, with its model and its searches on the device.

    Args:
        path: of the index.
        task_spec: the task to run, as `path/to/file.py:Class`. None: the one that the index names, if it is shipped.
        task_arguments: for the task's constructor. None: those that the index was built with.
        model: False to run no task at all and answer sketches only.
        device: a torch device name.
        settings: the limits.

    Raises:
        LoadError: the task may not run unasked, or its model makes other sketches than the index holds.
        FileNotFoundError: no index at the path.
        ValueError: the index is damaged, the task can't be loaded, or the device is not available.
    """
    settings = settings or Settings()
    index = open_index(path, device=device)
    if not model:
        if task_spec is not None:
            raise LoadError(f"a task ({task_spec}) was given for an index to be served without its model; drop one")
        return Engine(index, settings=settings)
    spec = _allowed_spec(index, task_spec)
    task = load_task(spec, index.task_arguments if task_arguments is None else task_arguments)
    sketcher = ExampleSketcher(task, index.config, device=device)
    if sketcher.fingerprint != index.fingerprint:
        raise LoadError(
            f"task {spec} makes sketches of fingerprint {sketcher.fingerprint}, index {index.path} holds "
            f"{index.fingerprint}: the task has other checkpoints, learning rates or loop parameters than the index "
            "was built from. Serve the task it was built from, rebuild the index, or use --no-model"
        )
    if changed := index.changed_checkpoints(sketcher.checkpoints):
        raise LoadError(
            f"the weights of checkpoint {', '.join(changed)} of task {spec} are not those that index {index.path} was "
            "built from: serve the task with its old files, rebuild the index, or use --no-model"
        )
    return Engine(index, QueryModel(task, sketcher, index, batch_size=settings.batch_size), settings=settings)


def _allowed_spec(index: Index, task_spec: str | None) -> str:
    if task_spec is not None:
        return task_spec
    named = index.task_spec
    if named is None:
        raise LoadError(f"index {index.path} names no task: give --task path/to/file.py:Class, or --no-model")
    if not is_shipped(named):
        raise LoadError(
            f"index {index.path} names the task {named}, which is not one of Loopsway's own: its code only runs when "
            f"you name it, with --task {named}. To serve without it, give --no-model"
        )
    return named
