"""A published index, opened for reading: `open_index` and `Index`.

N examples, Q queries, S steps of the index, T steps of a query, W width, n chosen examples, k results of each sign.

This file knows no model: a query comes as sketches. An open index keeps the generation that it opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from operator import and_
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch

from ..config import Approximation, Checkpoint, Loop, Resolve, SketchConfig
from ..sketches.coding import rotate_back, standard_errors
from ..sketches.gradient_sketcher import GradientSketcher
from ..store.addresses import open_folder
from ..store.folders import IndexDamagedError, LocalFolder
from ..store.generation import ROW_AXES, Generation
from ..store.manifest import Manifest, checkpoint_digests
from .device_scan import DeviceScan, device_scan
from .filters import matching_rows
from .queries import checked_sketches, chosen_steps, query_vectors
from .ranking import TOTAL, Example, Influencers, Pair, Ranked, Ranking, Scores, pairs, slot_name
from .reading import CodeReader, Efforts
from .sharded import Coverage, LocalShards, ShardedReader
from .slot import inner_products

EXAMPLES, SKIPPED, RECALL = "examples.parquet", "skipped.parquet", "recall.json"

TrajectoryResolve = Resolve | Literal["step_matrix"]


class UnknownExampleError(LookupError):
    """No example of this id is in the index."""


def open_index(
    path: str | Path,
    *,
    generation: int | None = None,
    device: str = "cpu",
    device_bytes: int | None = None,
    name: str | None = None,
) -> Index:
    """Opens a finished index for search.

    Args:
        path: its folder, or its URL `s3://bucket/prefix`.
        generation: an earlier generation that is still kept; None: the last.
        device: the torch device that reads the codes in exact searches. Their answers are the same on any.
        device_bytes: of codes that stay on the device; a slot is copied there when it is first searched, and the one
            that was not used for longest leaves. Those beyond are copied block by block in each search. None: half of
            what the device has free at the first search. Of no meaning for "cpu".
        name: what it is called. None: as its folder, without ".index".

    Raises:
        IndexNotFoundError: there is none, it is unfinished, or it has no such generation.
        IndexDamagedError: a file is missing, of the wrong size or unreadable.
        StorageError: the object store can't be reached, or the cache of its files is too small.
        ValueError: the device is unknown or not available, or device_bytes is negative.
    """
    return Index(path, generation, device_scan(device, device_bytes), name=name)


class Index:
    """An index on disk. Make it with `open_index`.

    It keeps the generation that it opened, whatever is added or deleted meanwhile. Thread-safe for reading. Rows are
    numbered over all parts, deleted ones included. Rows of codes are read through memory maps when they are needed.

    Attributes:
        folder: where it lies.
        name: what it is called.
        manifest: what it is.
        codes: reads them in this process.
        reader: reads all of them; through `codes`, unless they are read elsewhere (ray_shards.py).
    """

    def __init__(
        self,
        path: str | Path,
        generation: int | None,
        scan: DeviceScan | None = None,
        rows: range | None = None,
        name: str | None = None,
    ) -> None:
        self.folder = open_folder(path)
        self.name = name or self.folder.address.rpartition("/")[2].removesuffix(".index")
        self._device = "cpu" if scan is None else str(scan.device)
        self.manifest = Manifest.read(self.folder, generation)
        self._check_files()
        self._stored = [Generation(self.folder / part.folder, part.plan) for part in self.manifest.parts]
        self._is_deleted = self._read_deleted()
        self.codes = CodeReader(self.manifest, self._stored, self._is_deleted, scan, rows)
        self.reader = ShardedReader(LocalShards([self.codes]))

    @property
    def path(self) -> Path | str:
        """Its folder, or its URL."""
        return self.folder.path if isinstance(self.folder, LocalFolder) else self.folder.address

    @property
    def num_rows(self) -> int:
        """Deleted ones included."""
        return self.manifest.num_rows

    @property
    def num_examples(self) -> int:
        return self.num_rows - int(self._is_deleted.sum())

    @property
    def num_skipped(self) -> int:
        """How many of them had no finite loss or gradient and are in no answer."""
        return sum(not self._is_deleted[row] for row in self._skipped_rows)

    @property
    def num_steps(self) -> int:
        return self.manifest.plan.num_steps

    @property
    def width(self) -> int:
        return self.manifest.plan.width

    @property
    def bits(self) -> int:
        return self.config.bits

    @property
    def fingerprint(self) -> str:
        return self.manifest.plan.fingerprint

    @property
    def config(self) -> SketchConfig:
        return self.manifest.plan.config

    @property
    def loop(self) -> Loop:
        return self.manifest.plan.loop

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return self.manifest.plan.checkpoints

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is attributed to."""
        return dict(self.manifest.plan.parameters)

    @property
    def task_spec(self) -> str | None:
        return self.manifest.plan.task_spec

    @property
    def task_arguments(self) -> dict[str, Any]:
        return dict(self.manifest.plan.task_arguments)

    @property
    def generation(self) -> int:
        return self.manifest.generation

    @property
    def created_at(self) -> str:
        return self.manifest.created_at

    @cached_property
    def gradient_sketcher(self) -> GradientSketcher:
        """Sketches queries that come as gradients, on the device of the searches; its hashes are drawn once.

        Raises:
            GradientError: the index is optimizer-aware: its scales are in the task's checkpoints alone.
        """
        return GradientSketcher.without_model(self.parameters, self.checkpoints, self.config, device=self._device)

    @property
    def steps_without_gradient(self) -> tuple[int, ...]:
        return tuple(sorted(set.intersection(*(set(part.steps_without_gradient) for part in self.manifest.parts))))

    @property
    def plan(self) -> list[dict[str, Any]]:
        """How each parameter was sketched in the last part, and what it cost: the fields of `PlanEntry`."""
        return [dict(entry) for entry in self.manifest.parts[-1].sketching]

    @property
    def slots(self) -> list[str]:
        """What the rows of a sketch stand for: the steps from "0" on; with Loop(outside=True) "before" and "after"."""
        if not self.loop.outside:
            return [str(step) for step in range(self.num_steps)]
        return [*(str(step) for step in range(self.num_steps - 2)), "before", "after"]

    @property
    def size_bytes(self) -> int:
        """On disk, all files of this generation's parts."""
        return sum(stored.size_bytes() for stored in self._stored)

    @property
    def recall(self) -> dict[str, Any]:
        """What the build measured of its FAISS indices against a scan of every code, of the worst part."""
        return min(self._recalls, key=lambda each: min(each["by_slot"].values()))

    @cached_property
    def _recalls(self) -> list[dict[str, Any]]:
        """Of each part."""
        return [json.loads(stored.folder.read(RECALL)) for stored in self._stored]

    @property
    def approximation(self) -> Approximation:
        """Of the FAISS indices: that of the first part, which later ones keep."""
        return self.manifest.parts[0].approximation

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Ids of the skipped examples, and what is not finite of each."""
        return {
            self._ids[row].as_py(): reason for row, reason in self._skipped_rows.items() if not self._is_deleted[row]
        }

    @cached_property
    def _skipped_rows(self) -> dict[int, str]:
        found: dict[int, str] = {}
        for part, start in zip(self.manifest.parts, self._starts, strict=True):
            table = self._table(f"{part.folder}/{SKIPPED}")
            rows = (start + row for row in table["row"].to_pylist())
            found |= dict(zip(rows, table["reason"].to_pylist(), strict=True))
        return found

    @property
    def _starts(self) -> list[int]:
        """The first row of each part."""
        return [rows.start for rows in self.manifest.part_rows()]

    def _read_deleted(self) -> np.ndarray:
        is_deleted = np.zeros(self.num_rows, bool)
        if self.manifest.deleted is not None:
            is_deleted[self._table(self.manifest.deleted, ["row"])["row"].to_numpy()] = True
        return is_deleted

    def stored_rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """What the arrays of the store hold of these rows, by name; rows are the last dimension but that of codes."""
        places = np.searchsorted(self._starts, rows, side="right") - 1
        read = [stored.rows(rows[places == part] - self._starts[part]) for part, stored in enumerate(self._stored)]
        order = np.argsort(np.argsort(places, kind="stable"), kind="stable")
        return {
            name: np.concatenate([part[name] for part in read], axis=axis).take(order, axis=axis)
            for name, axis in ROW_AXES.items()
        }

    def sketches(self, rows: np.ndarray) -> np.ndarray:
        """Sketches as their codes have them, float32 [n, S + 1, W]: of each step, then of the total.

        Their inner products with a query's sketch are the influences that searches give.
        """
        slots = [*range(self.num_steps), None]
        decoded = np.stack([self.codes.decoded(slot, rows) for slot in slots], axis=1)
        return rotate_back(torch.from_numpy(decoded), self.config.seed, self.config.rotations).numpy()

    def live_rows(self) -> np.ndarray:
        """Rows that are not deleted, int64, ascending."""
        return np.flatnonzero(~self._is_deleted)

    def sketched_rows(self) -> np.ndarray:
        """Rows that are neither deleted nor skipped, int64, ascending."""
        return np.setdiff1d(self.live_rows(), list(self._skipped_rows))

    def changed_checkpoints(self, checkpoints: Sequence[Checkpoint]) -> tuple[str, ...]:
        """Names of those whose files are not the ones that the index was built from."""
        built, now = self.manifest.plan.checkpoint_digests, checkpoint_digests(checkpoints)
        return tuple(name for name, digest in now.items() if built.get(name, digest) != digest)

    def mean_losses(self) -> np.ndarray:
        """The mean loss of all rows, deleted ones included, at each checkpoint, [K]."""
        counts = [part.plan.num_examples - part.num_skipped for part in self.manifest.parts]
        return np.average([part.mean_losses for part in self.manifest.parts], axis=0, weights=counts)

    def blocks(self) -> list[range]:
        """Rows that lie together, block by block: all of them, deleted ones included."""
        return self.manifest.blocks()

    def step_norms(self) -> np.ndarray:
        """Norms of all sketches, float32 [S, N]."""
        return np.stack([self.codes.norms(step) for step in range(self.num_steps)])

    def total_norms(self) -> np.ndarray:
        """Norms of the sketches summed over steps, float32 [N]."""
        return self.codes.norms(None)

    def example(self, row: int) -> Example:
        """The example in this row."""
        table = self.examples
        metadata = table["metadata"][row].as_py() if "metadata" in table.column_names else {}
        return Example(id=table["id"][row].as_py(), description=table["description"][row].as_py(), metadata=metadata)

    def row_of(self, example_id: str) -> int:
        """The row of an example.

        Raises:
            UnknownExampleError: the id is not in the index.
        """
        row = self._rows_by_id.get(example_id)
        if row is not None and self._is_deleted[row]:
            raise UnknownExampleError(f"example {example_id!r} was deleted from index {self.name}")
        if row is None:
            raise UnknownExampleError(
                f"example {example_id!r} is not among the {self.num_examples} of index {self.name}; its ids look like "
                f"{self.examples['id'][0].as_py()!r}"
            )
        if self.num_skipped and example_id in self.skipped:
            raise UnknownExampleError(
                f"example {example_id!r} was skipped when index {self.name} was built: its {self.skipped[example_id]}"
            )
        return row

    def warm_up(self) -> None:
        """Reads what exact searches read, or fetches it, so that the first is as fast as later ones."""
        self.reader.warm_up()
        noise = np.random.default_rng(0).standard_normal((self.num_steps, self.width)).astype(np.float32)
        for resolve in ("query_step", "train_step"):
            self.search(noise, resolve=resolve)

    def close(self) -> None:
        """Lets go of readers elsewhere; searches of this process's own need no closing."""
        self.reader.close()

    def search(
        self,
        query_sketches: Any,
        k: int = 10,
        resolve: Resolve = "query_step",
        steps: Sequence[int] | None = None,
        *,
        where: str | None = None,
        exact: bool = True,
        go_on: Callable[[], object] | None = None,
        deadline: float | None = None,
    ) -> Any:
        """The strongest proponents and opponents of each query, in total and at each step.

        Args:
            query_sketches: float32 [T, W] or [Q, T, W], as StepSketcher and ExampleSketcher give them.
            k: examples of each sign, at least 1; fewer are returned where there are no more.
            resolve: "query_step" (one answer for each step of the query), "train_step" (each step of the training
                examples) or "same_step".
            steps: only these; None: all.
            where: a filter over the examples (filters.py), which the search is done within; None: all.
            exact: whether every stored code is read, which finds the exact top k; False takes the candidates of the
                FAISS indices, as many as the build found to be enough, unless `where` leaves too few rows for them. The
                answer's `recall` says which it was.
            go_on: called before each costly part, the scan of one slot. What it raises ends the search.
            deadline: when to stop waiting for shards elsewhere, by `time.monotonic()`: the answer's `coverage` says how
                many answered. None: when they are given up anyway.

        Returns:
            A Ranking, or a list of Q of them.

        Raises:
            FilterError: the filter can't be read, or does not fit the columns.
            ValueError: the sketches' shape or values, k, resolve or steps; the text says which.
            ShardsUnavailableError: no shard answered.
        """
        sketches, single = checked_sketches(query_sketches, self.width)
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        wanted = pairs(resolve, self.num_steps, sketches.shape[1])
        chosen = chosen_steps(steps, len(wanted))
        vectors = query_vectors(sketches, self.config)
        kept = None if where is None else matching_rows(self.examples, where)
        asked = {Pair(None, TOTAL), *(wanted[step] for step in chosen)}
        slots = {pair.slot for pair in asked}
        exact = exact or self.reader.reads_everything
        efforts = None if exact else {slot: self._efforts(slot) for slot in slots}
        found, coverage = self._search_pairs(
            asked, vectors, k, kept=kept, efforts=efforts, deadline=deadline, go_on=go_on
        )
        rankings = [
            Ranking(
                total=self._influencers(None, *found[Pair(None, TOTAL)][query], k),
                steps=tuple(self._influencers(step, *found[wanted[step]][query], k) for step in chosen),
                recall=1.0 if exact else self._least_recall(slots),
                coverage=coverage.share,
            )
            for query in range(len(sketches))
        ]
        return rankings[0] if single else rankings

    def scores(
        self,
        query_sketches: Any,
        resolve: Resolve = "query_step",
        *,
        where: str | None = None,
        go_on: Callable[[], object] | None = None,
        deadline: float | None = None,
    ) -> Scores:
        """The influence of every example, in total and at each step; it takes 8 (S + 1) Q n bytes.

        Args:
            query_sketches: float32 [T, W] or [Q, T, W].
            resolve: as in `search`.
            where: as in `search`.
            go_on: as in `search`.
            deadline: as in `search`; examples of shards that did not answer are left out.

        Raises:
            FilterError, ValueError, ShardsUnavailableError: as `search`.
        """
        sketches, _ = checked_sketches(query_sketches, self.width)
        steps = pairs(resolve, self.num_steps, sketches.shape[1])
        wanted = [Pair(None, TOTAL), *steps]
        vectors = query_vectors(sketches, self.config)
        rows = self.sketched_rows()
        if where is not None:
            rows = rows[matching_rows(self.examples, where)[rows]]
        influences = np.empty((len(sketches), len(wanted), len(rows)), np.float32)
        errors, coverages = np.empty_like(influences), list[Coverage]()
        for slot in {pair.slot for pair in wanted}:
            if go_on is not None:
                go_on()
            mine = [place for place, pair in enumerate(wanted) if pair.slot == slot]
            queries = vectors[:, [wanted[place].query for place in mine]]  # [Q, pairs, W]
            scores, coverage = self.reader.scores(slot, queries.reshape(-1, self.width), deadline=deadline)
            coverages.append(coverage)
            influences[:, mine] = scores[:, rows].reshape(len(sketches), len(mine), -1)
            norms = np.linalg.norm(queries, axis=2)[:, :, None]
            errors[:, mine] = self._errors(influences[:, mine], self.codes.norms_of(slot, rows), norms)
        coverage = reduce(and_, coverages)
        if coverage.share < 1:
            covered = coverage.covers(rows)
            rows, influences, errors = rows[covered], influences[..., covered], errors[..., covered]
        return Scores(
            rows=rows,
            steps=(None, *range(len(steps))),
            influences=influences,
            standard_errors=errors,
            coverage=coverage.share,
        )

    def trajectories(
        self, query_sketches: Any, example_ids: Sequence[str], resolve: TrajectoryResolve = "query_step"
    ) -> np.ndarray:
        """The influence of chosen examples on each query, step by step.

        Args:
            query_sketches: float32 [T, W] or [Q, T, W].
            example_ids: n ids of indexed examples.
            resolve: as in `search`, or "step_matrix" for every pair of a training step and a query step.

        Returns:
            float32 [Q, n, T] (train_step: [Q, n, S]); "step_matrix": [Q, n, S, T]. Over query_step it adds up to the
            total influence.

        Raises:
            ValueError: as in `search`.
            UnknownExampleError: an id is not in the index.
        """
        return self.trajectories_with_errors(query_sketches, example_ids, resolve)[0]

    def standard_errors(
        self, query_sketches: Any, example_ids: Sequence[str], resolve: TrajectoryResolve = "query_step"
    ) -> np.ndarray:
        """The standard error of each number of `trajectories`, of the same shape."""
        return self.trajectories_with_errors(query_sketches, example_ids, resolve)[1]

    def trajectories_with_errors(
        self, query_sketches: Any, example_ids: Sequence[str], resolve: TrajectoryResolve = "query_step"
    ) -> tuple[np.ndarray, np.ndarray]:
        """`trajectories` and `standard_errors` at the cost of one of them."""
        sketches, _ = checked_sketches(query_sketches, self.width)
        rows = np.array([self.row_of(example_id) for example_id in example_ids], dtype=np.int64)
        query_steps = sketches.shape[1]
        if resolve == "step_matrix":
            wanted = [Pair(slot, step) for slot in range(self.num_steps) for step in range(query_steps)]
        else:
            wanted = pairs(resolve, self.num_steps, query_steps)
        vectors = query_vectors(sketches, self.config)  # [Q, T + 1, W]
        decoded = {slot: self.codes.decoded(slot, rows) for slot in {pair.slot for pair in wanted}}
        influences = np.stack(
            [inner_products(vectors[:, p.query], decoded[p.slot]) for p in wanted], axis=2
        )  # [Q, n, .]
        norms = np.linalg.norm(vectors, axis=2)
        errors = np.stack(
            [
                self._errors(influences[:, :, place], self.codes.norms_of(pair.slot, rows), norms[:, pair.query, None])
                for place, pair in enumerate(wanted)
            ],
            axis=2,
        )
        if resolve == "step_matrix":
            shape = (len(sketches), len(rows), self.num_steps, query_steps)
            return influences.reshape(shape), errors.reshape(shape)
        return influences, errors

    def _search_pairs(
        self,
        wanted: set[Pair],
        vectors: np.ndarray,
        k: int,
        *,
        kept: np.ndarray | None,
        efforts: Efforts | None,
        deadline: float | None,
        go_on: Callable[[], object] | None,
    ) -> tuple[dict[Pair, list[tuple[np.ndarray, np.ndarray, np.ndarray]]], Coverage]:
        """(rows, influences, standard errors) of each pair's candidates for each query; one scan for a slot."""
        found, mine = {}, {pair.slot: list[Pair]() for pair in wanted}
        for pair in sorted(wanted, key=lambda pair: pair.query):
            mine[pair.slot].append(pair)
        asked = {  # [pairs * Q, W] of each slot
            slot: np.concatenate([vectors[:, pair.query] for pair in own]) for slot, own in mine.items()
        }
        ranked, coverages = dict[int | None, Any](), list[Coverage]()
        # Shards are asked for all slots at once; one reading can end between two.
        for part in [asked] if self.reader.reads_everything else [{slot: asked[slot]} for slot in asked]:
            if go_on is not None:
                go_on()
            of_part, coverage = self.reader.search(part, k, kept=kept, efforts=efforts, deadline=deadline)
            ranked |= of_part
            coverages.append(coverage)
        for slot, queries in asked.items():
            norms = np.linalg.norm(queries, axis=1)
            answers = [
                (rows, scores, self._errors(scores, self.codes.norms_of(slot, rows), norm))
                for (rows, scores), norm in zip(ranked[slot], norms, strict=True)
            ]
            for place, pair in enumerate(mine[slot]):
                found[pair] = answers[place * len(vectors) : (place + 1) * len(vectors)]
        return found, reduce(and_, coverages)

    def _efforts(self, slot: int | None) -> list[int]:
        """That the build found each part's FAISS indices to need; 1 where an earlier version built them."""
        return [each.get("efforts", {}).get(slot_name(slot), 1) for each in self._recalls]

    def _least_recall(self, slots: set[int | None]) -> float:
        return min(each["by_slot"][slot_name(slot)] for each in self._recalls for slot in slots)

    def _influencers(
        self, step: int | None, rows: np.ndarray, scores: np.ndarray, errors: np.ndarray, k: int
    ) -> Influencers:
        best = np.flatnonzero(scores > 0)[:k]
        worst = np.flatnonzero(scores < 0)
        worst = worst[np.lexsort((rows[worst], scores[worst]))][:k]
        proponents, opponents = (
            Ranked(
                example_ids=tuple(self.examples["id"].take(rows[own]).to_pylist()),
                rows=rows[own],
                influences=scores[own],
                standard_errors=errors[own],
            )
            for own in (best, worst)
        )
        return Influencers(step=step, proponents=proponents, opponents=opponents)

    def _errors(self, influences: np.ndarray, norms: np.ndarray, query_norms: Any) -> np.ndarray:
        return standard_errors(influences, norms, query_norms, width=self.width, bits=self.bits)

    def _check_files(self) -> None:
        files = self.manifest.all_files
        for name, size in self.folder.sizes(files).items():
            if size != files[name]["size_bytes"]:
                state = "is missing" if size is None else f"has {size} bytes, not {files[name]['size_bytes']}"
                raise IndexDamagedError(f"index {self.folder} is damaged: {self.folder.at(name)} {state}; rebuild it")

    @cached_property
    def examples(self) -> Any:
        """Ids, descriptions and metadata of all rows, a pyarrow table."""
        names = [f"{part.folder}/{EXAMPLES}" for part in self.manifest.parts]
        return pa.concat_tables(map(self._table, names)).combine_chunks()

    def _table(self, name: str, columns: list[str] | None = None) -> Any:
        with self.folder.local(name, lambda: self.manifest.all_files[name]["digest"]) as file:
            return pyarrow.parquet.read_table(file, columns=columns)

    @property
    def _ids(self) -> Any:
        return self.examples["id"]

    @cached_property
    def _rows_by_id(self) -> dict[str, int]:
        """Of deleted rows too, unless a later one has the same id."""
        return {example_id: row for row, example_id in enumerate(self._ids.to_pylist())}
