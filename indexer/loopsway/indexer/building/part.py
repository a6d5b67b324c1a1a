"""Builds one part of an index from a task's examples, block by block, or what is missing of one that was cut.

A block of rows is sketched, rotated, coded and stored; its entry makes it done. After the last block come one FAISS
index for each step and the total, and a measurement of their recall.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any, Literal

import numpy as np

from ..config import Approximation, SketchConfig
from ..progress import BuildProgress
from ..search.faiss_index import check_factory
from ..search.queries import checked_sketches, query_vectors
from ..search.shards import shard_rows
from ..sketches.coding import row_bytes
from ..sketches.features import ExampleSketcher
from ..stopping import Stop, stop_on_signals
from ..store.folders import Folder, IndexDamagedError
from ..store.generation import Generation
from ..store.manifest import PLAN, IndexExistsError, Part, Plan, checkpoint_digests
from ..store.parts import new_part_name, remove_partial_files, unfinished_part
from ..store.sealed import SealError, read_sealed, write_sealed
from ..task import Task, TaskError
from .blocks import BlockSketcher, NonFinite
from .changes import refuse_changed_results
from .engines import Engine, LocalEngine
from .examples import SubsetTask, code_digest, example_table, examples_digest
from .publication import finished_part

LEAST_BLOCK_ROWS, MOST_BLOCK_ROWS, LEAST_BLOCKS = 128, 2048, 16


class PartBuilder:
    """What a part is built from, and how. The other arguments are those of `build_index`.

    Args:
        approximation: of its FAISS indices.
        is_addition: to an index: it may have fewer rows than these can be trained on.

    Attributes:
        table: ids, descriptions and metadata of the examples.
        plan: of the part.
    """

    def __init__(
        self,
        task: Task,
        config: SketchConfig | None,
        *,
        task_spec: str | None,
        task_arguments: Mapping[str, Any] | None,
        batch_size: int,
        block_rows: int | None,
        device: str,
        nonfinite: NonFinite,
        engine: Literal["local", "ray"],
        workers: int | None,
        address: str | None,
        progress: bool,
        approximation: Approximation,
        recall_queries: np.ndarray | None = None,
        is_addition: bool = False,
    ) -> None:
        examples = task.examples()
        if not len(examples):
            raise TaskError(f"{type(task).__name__}.examples() is empty; an index needs at least one example")
        self._sketcher = ExampleSketcher(task, config, device=device, batch_size=batch_size)
        rows, sketch = block_rows or new_block_rows(len(examples)), self._sketcher.config
        assert sketch.width is not None
        shards = shard_rows(len(examples), row_bytes(sketch.width, sketch.bits), rows)
        if not is_addition:
            check_factory(approximation.factory, sketch.width, min(shards, len(examples)))
        self._approximation, self._given_queries = approximation, None
        if recall_queries is not None:
            self._given_queries = query_vectors(checked_sketches(recall_queries, sketch.width)[0], sketch)
        self.table = example_table(task, len(examples))
        blocks = BlockSketcher(task, self._sketcher, nonfinite=nonfinite)
        self._probe, self._progress = blocks.probe(), progress
        self.plan = Plan(
            fingerprint=self._sketcher.fingerprint,
            task_spec=task_spec,
            task_arguments=dict(task_arguments or {}),
            loop=task.loop,
            config=sketch,
            checkpoints=self._sketcher.checkpoints,
            parameters=self._sketcher.parameters,
            num_examples=len(examples),
            num_steps=self._probe.values.shape[1],
            examples_digest=examples_digest(task, examples, self.table["id"].to_pylist()),
            task_code=code_digest(task),
            checkpoint_digests=checkpoint_digests(self._sketcher.checkpoints),
            batch_size=batch_size,
            block_rows=rows,
            shard_rows=shards,
        )
        self._engine: Engine = LocalEngine(blocks)
        if engine == "ray":
            from .ray_engine import RayEngine  # here: it is an extra's

            self._engine = RayEngine(
                task_spec,
                task_arguments or {},
                rows=task.rows if isinstance(task, SubsetTask) else None,
                device=device,
                nonfinite=nonfinite,
                workers=workers,
                address=address,
            )

    def build(self, folder: Folder) -> Part:
        """The part, finished and not yet published.

        Args:
            folder: the index's, whose lock is held.

        Raises:
            IndexExistsError: a part of something else was begun there.
            NonFiniteExampleError, RecallError, StoppedError, ValueError: as `build_index`.
        """
        name, generation = self._begin(folder)
        self._sketcher.batch_size = generation.plan.batch_size
        with BuildProgress(shown=self._progress) as bars, stop_on_signals(bars.announce_stop) as stop:
            self._sketch_blocks(folder, generation, bars, stop)
            sketching = [entry.to_dict() for entry in self._sketcher.plan()]
            return finished_part(
                folder,
                name,
                generation,
                self.table,
                sketching=sketching,
                bars=bars,
                stop=stop,
                approximation=self._approximation,
                given_queries=self._given_queries,
            )

    def _begin(self, folder: Folder) -> tuple[str, Generation]:
        """The part to build, and its name; one that was cut, with its own plan, to go on in the same batches."""
        remove_partial_files(folder)
        name, plan = unfinished_part(folder), self.plan
        if name is None:
            name = new_part_name(folder)
            write_sealed(folder / name, PLAN, plan.to_dict())
        else:
            try:
                plan = Plan.from_dict(read_sealed(folder / name, PLAN))
            except (SealError, KeyError, TypeError) as error:
                raise IndexDamagedError(
                    f"{folder.at(f'{name}/{PLAN}')} is damaged: {error}; remove {folder.at(name)} and build again"
                ) from error
            if differences := plan.differences(self.plan):
                raise IndexExistsError(
                    f"{folder} already holds the beginning of something else ({'; '.join(differences)[:2000]}): go on "
                    "with what it was begun with, or drop it with `loopsway prune` (or, before the first index is "
                    "finished, by removing that folder)"
                )
        generation = Generation(folder / name, plan)
        generation.create()
        return name, generation

    def _sketch_blocks(self, folder: Folder, generation: Generation, bars: BuildProgress, stop: Stop) -> None:
        plan, finished = generation.plan, generation.finished()
        if 0 in finished:
            refuse_changed_results(folder, generation, self._probe)
        done = sum(entry.num_rows for entry in finished.values())
        bars.begin(self._engine.title, plan.num_examples, done=done)
        missing = [block for block in range(plan.num_blocks) if block not in finished]
        with closing(self._engine.run(generation, missing, bars.advance)) as stored:
            for count, block in enumerate(stored, start=len(finished) + 1):
                done += len(plan.rows_of(block))
                bars.describe(f"{self._engine.title}, {count} of {plan.num_blocks} blocks stored")
                stop.raise_if_asked(
                    f"stopped as asked: {done:,} of {plan.num_examples:,} examples are stored in {folder}; run the "
                    "same command to go on"
                )


def new_block_rows(num_examples: int) -> int:
    """A power of two: large blocks read fast, and a build that is cut loses at most one."""
    rows = LEAST_BLOCK_ROWS
    while rows < MOST_BLOCK_ROWS and rows * LEAST_BLOCKS < num_examples:
        rows *= 2
    return rows
