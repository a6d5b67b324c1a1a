"""Sketches blocks in actors on a Ray cluster: the same function as in this process, so the index is the same.

An actor that dies is replaced, and its block is given out again. The driver may die too: finished blocks are in the
store, and the same command goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..cluster import RayActorError, RayTaskError, connect, ray
from ..sketches.features import ExampleSketcher
from ..store.addresses import open_folder
from ..store.generation import Generation
from ..store.manifest import Plan
from ..task import load_task
from .blocks import BlockSketcher, NonFinite
from .examples import SubsetTask

MOST_DEATHS = 3  # over one block, before the build gives up


class WorkersDiedError(RuntimeError):
    """Actors die again and again over the same block."""


class RayEngine:
    """Sketches in actors, one a GPU or CPU.

    Args:
        task_spec: of the task, which each actor makes for itself.
        task_arguments: its constructor's.
        rows: the task's examples that are to be sketched; None: all.
        device: "cuda" for actors with a GPU each, "cpu" for actors with a CPU each.
        nonfinite: as `BlockSketcher`.
        workers: number of actors; None: one for each GPU of the cluster, or CPU.
        address: of the cluster; None: that of RAY_ADDRESS, or one that is started for the build.

    Raises:
        ValueError: there is no task_spec.
    """

    def __init__(
        self,
        task_spec: str | None,
        task_arguments: Mapping[str, Any],
        *,
        rows: Sequence[int] | None,
        device: str,
        nonfinite: NonFinite,
        workers: int | None,
        address: str | None,
    ) -> None:
        if task_spec is None:
            raise ValueError(
                'engine="ray" needs task_spec, such as "path/to/file.py:MyTask": each actor makes the task itself'
            )
        self._task = (_absolute(task_spec), dict(task_arguments), rows, device, nonfinite)
        self._resource = "GPU" if device.startswith("cuda") else "CPU"
        self._starts_cluster = connect(address)
        self._workers = workers or max(1, int(ray.cluster_resources().get(self._resource, 0)))
        self.title = f"sketching examples, {self._workers} workers"

    def run(self, generation: Generation, blocks: Sequence[int], on_examples: Callable[[int], None]) -> Generator[int]:
        waiting, deaths = list(reversed(blocks)), dict.fromkeys(blocks, 0)
        actors: list[Any] = []
        running: dict[Any, tuple[Any, int]] = {}  # of each call under way: its actor and block
        try:
            while waiting or running:
                while waiting and len(running) < self._workers:
                    busy = [actor for actor, _ in running.values()]
                    actor = next((each for each in actors if each not in busy), None)
                    if actor is None:
                        actor = self._new_actor(generation)
                        actors.append(actor)
                    block = waiting.pop()
                    running[actor.sketch.remote(block)] = actor, block
                [call], _ = ray.wait(list(running), num_returns=1)
                actor, block = running.pop(call)
                try:
                    count = ray.get(call)
                except RayActorError as error:
                    actors.remove(actor)
                    deaths[block] += 1
                    if deaths[block] == MOST_DEATHS:
                        raise WorkersDiedError(
                            f"{MOST_DEATHS} workers died over block {block}; the last said: "
                            f"{str(error).splitlines()[0]} Give them more memory, or a smaller batch, and run the same "
                            "command to go on"
                        ) from error
                    waiting.append(block)
                    continue
                except RayTaskError as error:
                    raise error.cause from None
                on_examples(count)
                yield block
        finally:
            for actor in actors:
                ray.kill(actor)
            if self._starts_cluster:
                ray.shutdown()

    def _new_actor(self, generation: Generation) -> Any:
        amount = {"num_gpus": 1} if self._resource == "GPU" else {"num_cpus": 1}
        threads = torch.get_num_threads()  # other numbers of threads give other bits
        environment = {"env_vars": {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}}
        actor: Any = ray.remote(_Worker)
        return actor.options(**amount, runtime_env=environment, max_restarts=0).remote(
            sys.path, threads, self._task, generation.folder.address, generation.plan.to_dict()
        )


class _Worker:
    """An actor: a task, its models, and the part that it writes to."""

    def __init__(self, path: list[str], threads: int, task: tuple[Any, ...], folder: str, plan: dict[str, Any]) -> None:
        sys.path[:] = path
        torch.set_num_threads(threads)
        spec, arguments, rows, device, nonfinite = task
        self._generation = Generation(open_folder(folder), Plan.from_dict(plan))
        made, stored = load_task(spec, arguments), self._generation.plan
        if rows is not None:
            made = SubsetTask(made, rows)
        sketcher = ExampleSketcher(made, stored.config, device=device, batch_size=stored.batch_size)
        self._blocks = BlockSketcher(made, sketcher, nonfinite=nonfinite)

    def sketch(self, block: int) -> int:
        """Sketches and stores a block; gives its number of examples."""
        plan = self._generation.plan
        self._generation.write(block, self._blocks.coded(plan, block, lambda _: None))
        return len(plan.rows_of(block))


def _absolute(task_spec: str) -> str:
    place, _, name = task_spec.rpartition(":")
    return f"{Path(place).absolute()}:{name}" if place.endswith(".py") else task_spec
