"""From an index on disk to an engine that answers, with or without its model.

Task code runs in the model's process alone; here it is only decided which may run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopsway.indexer import LoadError, allowed_task, open_index

from .engine import Engine
from .model import QueryModel
from .settings import Settings


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where an index is, and what is needed to serve it: the same for every generation of it.

    Attributes:
        path: its folder or URL.
        name: that requests call it by. None: the folder's.
        task_spec: the task to run, as `path/to/file.py:Class`. None: the one that the index names, if it is shipped.
        task_arguments: for the task's constructor. None: those that the index was built with.
        model: False to run no task at all and answer sketches only.
        device: a torch device name, for searches.
    """

    path: str | Path
    name: str | None = None
    task_spec: str | None = None
    task_arguments: Mapping[str, Any] | None = None
    model: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.model and self.task_spec is not None:
            raise LoadError(
                f"a task ({self.task_spec}) was given for an index to be served without its model; drop one"
            )


def load_engine(source: Source, settings: Settings | None = None) -> Engine:
    """Opens the last generation of an index, to be served once it is warmed up.

    Raises:
        LoadError: the task may not run unasked.
        FileNotFoundError: no index at the path.
        ValueError: the index is damaged, or the device is not available.
    """
    settings = settings or Settings()
    index = open_index(source.path, device=source.device, name=source.name)
    if not source.model:
        return Engine(index, settings=settings)
    try:
        spec = allowed_task(index, source.task_spec)
    except LoadError as error:
        raise LoadError(f"{error}. To serve sketches alone, without the task, give --no-model") from error
    arguments = index.task_arguments if source.task_arguments is None else dict(source.task_arguments)
    return Engine(index, QueryModel(index, spec, arguments, settings), settings=settings)
