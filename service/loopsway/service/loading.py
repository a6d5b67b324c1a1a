"""From an index on disk to an engine that answers, with or without its model.

Task code runs in the model's process alone; here it is only decided which may run.
"""

from __future__ import annotations

from pathlib import Path

from loopsway.indexer import Index, LoadError, allowed_task, open_index

from .engine import Engine
from .model import QueryModel
from .settings import IndexSettings, Settings


def load_engine(asked: IndexSettings, settings: Settings | None = None) -> Engine:
    """Opens the last generation of an index, to be served once it is warmed up.

    Raises:
        LoadError: the task may not run unasked.
        FileNotFoundError: no index at the path.
        ValueError: the index is damaged, or the device is not available.
    """
    settings = _of_index(asked, settings or Settings())
    index = _opened(asked)
    try:
        spec = task_of(asked, index)
    except LoadError:
        index.close()
        raise
    if spec is None:
        return Engine(index, settings=settings)
    arguments = index.task_arguments if asked.task_arguments is None else dict(asked.task_arguments)
    return Engine(index, QueryModel(index, spec, arguments, settings), settings=settings)


def task_of(asked: IndexSettings, index: Index) -> str | None:
    """The task that runs for an index; None where it is served without its model.

    Raises:
        LoadError: the task may not run unasked, or its file is not there.
    """
    if not asked.model:
        if asked.task is not None:
            raise LoadError(f"a task ({asked.task}) was given for an index to be served without its model; drop one")
        return None
    try:
        spec = allowed_task(index, asked.task)
    except LoadError as error:
        raise LoadError(f"{error}. To serve sketches alone, without the task, give --no-model") from error
    file = spec.rpartition(":")[0]
    if file.endswith(".py") and not Path(file).is_file():
        raise LoadError(f"task file {file} of index {index.name} does not exist (looked from {Path.cwd()})")
    return spec


def check_engine(asked: IndexSettings) -> None:
    """Refuses what only shards on a Ray cluster take.

    Raises:
        ValueError: it is given for an index that is read in this process.
    """
    if asked.engine == "local" and not (asked.workers is None and asked.address is None):
        raise ValueError(
            f'workers {asked.workers} and address {asked.address} were given for engine "local", which is this '
            'process: give engine "ray" too, or drop them'
        )


def _of_index(asked: IndexSettings, settings: Settings) -> Settings:
    """The limits as they are for this index."""
    if asked.max_gradient_bytes is None:
        return settings
    return settings.model_copy(update={"max_gradient_bytes": asked.max_gradient_bytes})


def _opened(asked: IndexSettings) -> Index:
    check_engine(asked)
    if asked.engine == "local":
        return open_index(asked.path, device=asked.device, name=asked.name)
    from loopsway.indexer.search.ray_shards import open_ray_index  # here: it is an extra's

    return open_ray_index(
        asked.path, name=asked.name, workers=asked.workers, device=asked.device, address=asked.address
    )
