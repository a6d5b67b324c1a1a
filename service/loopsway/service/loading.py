"""From an index on disk to an engine that answers, with or without its model.

Task code runs in the model's process alone; here it is only decided which may run.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from loopsway.indexer import Index, IndexDamagedError, LoadError, allowed_task, open_index
from loopsway.indexer.store.addresses import open_folder
from loopsway.indexer.store.manifest import Manifest, history_numbers

from .engine import Engine
from .model import QueryModel
from .settings import IndexSettings, Settings

_Opened = TypeVar("_Opened")


def load_engine(asked: IndexSettings, settings: Settings | None = None, *, generation: int | None = None) -> Engine:
    """Opens an index, to be served once it is warmed up.

    Args:
        asked: which, and how.
        settings: of the server.
        generation: an earlier one that is still kept; None: the last.

    Raises:
        LoadError: the task may not run unasked.
        FileNotFoundError: no index at the path.
        ValueError: the index is damaged, or the device is not available.
    """
    settings = _of_index(asked, settings or Settings())
    index = _opened(asked, generation)
    try:
        spec = task_of(asked, index)
    except LoadError:
        index.close()
        raise
    if spec is None:
        return Engine(index, settings=settings)
    arguments = index.task_arguments if asked.task_arguments is None else dict(asked.task_arguments)
    model = QueryModel(index, spec, arguments, settings, device=asked.device)
    return Engine(index, model, settings=settings)


def newest_sound(
    asked: IndexSettings, opened: Callable[[int | None], _Opened]
) -> tuple[_Opened, IndexDamagedError | None]:
    """An index's last generation; where that is damaged, the newest before it that is not, and the damage.

    Args:
        asked: the index.
        opened: opens a generation; None: the last.

    Raises:
        IndexDamagedError: of the last generation; none before it opens either.
        Exception: another that `opened` raises.
    """
    try:
        return opened(None), None
    except IndexDamagedError as damage:
        return earlier_sound(asked, opened, published_generation(asked), damage), damage


def earlier_sound(
    asked: IndexSettings, opened: Callable[[int], _Opened], last: int | None, damage: IndexDamagedError
) -> _Opened:
    """The newest generation before `last` (None: of all that stayed) that is not damaged; raises `damage` for none."""
    for generation in reversed(history_numbers(open_folder(asked.path))):
        if last is None or generation < last:
            with suppress(IndexDamagedError, FileNotFoundError):  # the latter of one that is pruned just now
                return opened(generation)
    raise damage


def published_generation(asked: IndexSettings) -> int | None:
    """The number of an index's last generation; None where its manifest can't be read."""
    try:
        return Manifest.read(open_folder(asked.path)).generation
    except (ValueError, OSError):
        return None


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


def _opened(asked: IndexSettings, generation: int | None) -> Index:
    check_engine(asked)
    if asked.engine == "local":
        return open_index(asked.path, generation=generation, device=asked.device, name=asked.name)
    from loopsway.indexer.search.ray_shards import open_ray_index  # here: it is an extra's

    return open_ray_index(
        asked.path,
        generation=generation,
        name=asked.name,
        workers=asked.workers,
        device=asked.device,
        address=asked.address,
    )
