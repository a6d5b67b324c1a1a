"""From an index on disk to an engine that answers, with or without its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loopsway.indexer import LoadError, load_sketcher, open_index

from .engine import Engine
from .model import QueryModel
from .settings import Settings


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
    try:
        task, sketcher = load_sketcher(index, task_spec, task_arguments, device=device)
    except LoadError as error:
        raise LoadError(f"{error}. To serve sketches alone, without the task, give --no-model") from error
    model_of = QueryModel(task, sketcher, index, batch_size=settings.batch_size, batch_delay_s=settings.batch_delay_s)
    return Engine(index, model_of, settings=settings)
