"""From an index on disk to an engine that answers, with or without its model.

Task code runs in the model's process alone; here it is only decided which may run.
"""

from __future__ import annotations

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
    if not asked.model:
        if asked.task is not None:
            index.close()
            raise LoadError(f"a task ({asked.task}) was given for an index to be served without its model; drop one")
        return Engine(index, settings=settings)
    try:
        spec = allowed_task(index, asked.task)
    except LoadError as error:
        index.close()
        raise LoadError(f"{error}. To serve sketches alone, without the task, give --no-model") from error
    arguments = index.task_arguments if asked.task_arguments is None else dict(asked.task_arguments)
    return Engine(index, QueryModel(index, spec, arguments, settings), settings=settings)


def _of_index(asked: IndexSettings, settings: Settings) -> Settings:
    """The limits as they are for this index."""
    if asked.max_gradient_bytes is None:
        return settings
    return settings.model_copy(update={"max_gradient_bytes": asked.max_gradient_bytes})


def _opened(asked: IndexSettings) -> Index:
    if asked.engine == "local":
        if asked.workers is not None or asked.address is not None:
            raise ValueError(
                f'workers {asked.workers} and address {asked.address} were given for engine "local", which is this '
                'process: give engine "ray" too, or drop them'
            )
        return open_index(asked.path, device=asked.device, name=asked.name)
    from loopsway.indexer.search.ray_shards import open_ray_index  # here: it is an extra's

    return open_ray_index(
        asked.path, name=asked.name, workers=asked.workers, device=asked.device, address=asked.address
    )
