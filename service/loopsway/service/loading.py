"""From an index on disk to an engine that answers, with or without its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from loopsway.indexer import Index, LoadError, load_sketcher, open_index

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
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    address: str | None = None,
    settings: Settings | None = None,
) -> Engine:
    """Opens an index to be served, with its model and its searches on the device.

    Args:
        path: of the index.
        task_spec: the task to run, as `path/to/file.py:Class`. None: the one that the index names, if it is shipped.
        task_arguments: for the task's constructor. None: those that the index was built with.
        model: False to run no task at all and answer sketches only.
        device: a torch device name.
        engine: who reads the codes: "local", this process; "ray", actors on a Ray cluster, a shard each.
        workers: of "ray": shards; None: one for each GPU of the cluster, or each node.
        address: of "ray": the cluster's; None: that of RAY_ADDRESS, or one that is started here.
        settings: the limits.

    Raises:
        LoadError: the task may not run unasked, or its model makes other sketches than the index holds.
        FileNotFoundError: no index at the path.
        ValueError: the index is damaged, the task can't be loaded, or the device is not available.
    """
    settings = settings or Settings()
    index = _opened(path, device, engine, workers, address)
    if not model:
        if task_spec is not None:
            raise LoadError(f"a task ({task_spec}) was given for an index to be served without its model; drop one")
        return Engine(index, settings=settings)
    try:
        task, sketcher = load_sketcher(index, task_spec, task_arguments, device=device)
    except LoadError as error:
        index.close()
        raise LoadError(f"{error}. To serve sketches alone, without the task, give --no-model") from error
    model_of = QueryModel(task, sketcher, index, batch_size=settings.batch_size, batch_delay_s=settings.batch_delay_s)
    return Engine(index, model_of, settings=settings)


def _opened(path: str | Path, device: str, engine: str, workers: int | None, address: str | None) -> Index:
    if engine == "local":
        if workers is not None or address is not None:
            raise ValueError(
                f'workers {workers} and address {address} were given for engine "local", which is this process: give '
                'engine "ray" too, or drop them'
            )
        return open_index(path, device=device)
    from loopsway.indexer.search.ray_shards import open_ray_index  # here: it is an extra's

    return open_ray_index(path, workers=workers, device=device, address=address)
