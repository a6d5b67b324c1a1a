"""A published index, opened for reading: `open_index` and `Index`.

N examples, Q queries, S steps of the index, T steps of a query, W width, n chosen examples, k results of each sign.

This file knows no model: a query comes as sketches. An open index keeps the generation that it opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from itertools import islice, pairwise
from operator import and_
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..config import Resolve
from ..sketches.coding import standard_errors
from ..sketches.gradient_sketcher import GradientSketcher
from .contents import IndexContents
from .device_scan import DeviceScan, device_scan
from .filters import matching_rows
from .inner_loops import strongest
from .queries import checked_sketches, chosen_steps, query_vectors
from .ranking import TOTAL, Influencers, Pair, Ranked, Ranking, Scores, pairs, slot_name
from .reading import Efforts
from .sharded import Coverage, LocalShards, ShardedReader
from .slot import inner_products

TrajectoryResolve = Resolve | Literal["step_matrix"]
_Side = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows, influences, standard errors; the strongest first


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


class Index(IndexContents):
    """An index on disk. Make it with `open_index`.

    It keeps the generation that it opened, whatever is added or deleted meanwhile. Thread-safe for reading. Rows are
    numbered over all parts, deleted ones included. Rows of codes are read through memory maps when they are needed.

    Attributes:
        reader: reads all codes; in this process, unless they are read elsewhere (ray_shards.py).
    """

    def __init__(
        self,
        path: str | Path,
        generation: int | None,
        scan: DeviceScan | None = None,
        rows: range | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(path, generation, scan, rows, name)
        self._device = "cpu" if scan is None else str(scan.device)
        self.reader = ShardedReader(LocalShards([self.codes]))

    @cached_property
    def gradient_sketcher(self) -> GradientSketcher:
        """Sketches queries that come as gradients, on the device of the searches; its hashes are drawn once.

        Raises:
            GradientError: the index is optimizer-aware: its scales are in the task's checkpoints alone.
        """
        return GradientSketcher.without_model(self.parameters, self.checkpoints, self.config, device=self._device)

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
        in_order = [(None, Pair(None, TOTAL)), *((step, wanted[step]) for step in chosen)]
        rankings = list[Ranking]()
        for query in range(len(sketches)):
            total, *each_step = self._influencers([(step, found[pair][query]) for step, pair in in_order])
            rankings.append(
                Ranking(
                    total=total,
                    steps=tuple(each_step),
                    recall=1.0 if exact else self._least_recall(slots),
                    coverage=coverage.share,
                )
            )
        return rankings[0] if single else rankings

    def scores(
        self,
        query_sketches: Any,
        resolve: Resolve = "query_step",
        steps: Sequence[int] | None = None,
        *,
        where: str | None = None,
        go_on: Callable[[], object] | None = None,
        deadline: float | None = None,
    ) -> Scores:
        """The influence of every example, in total and at each of S steps; it takes 8 (S + 1) Q n bytes.

        Args:
            query_sketches: float32 [T, W] or [Q, T, W].
            resolve: as in `search`.
            steps: as in `search`.
            where: as in `search`.
            go_on: as in `search`.
            deadline: as in `search`; examples of shards that did not answer are left out.

        Raises:
            FilterError, ValueError, ShardsUnavailableError: as `search`.
        """
        sketches, _ = checked_sketches(query_sketches, self.width)
        every = pairs(resolve, self.num_steps, sketches.shape[1])
        chosen = chosen_steps(steps, len(every))
        wanted = [Pair(None, TOTAL), *(every[step] for step in chosen)]
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
            steps=(None, *chosen),
            influences=influences,
            standard_errors=errors,
            coverage=coverage.share,
        )

    def trajectories(
        self,
        query_sketches: Any,
        example_ids: Sequence[str],
        resolve: TrajectoryResolve = "query_step",
        steps: Sequence[int] | None = None,
    ) -> np.ndarray:
        """The influence of chosen examples on each query, step by step.

        Args:
            query_sketches: float32 [T, W] or [Q, T, W].
            example_ids: n ids of indexed examples.
            resolve: as in `search`, or "step_matrix" for every pair of a training step and a query step.
            steps: only these, in this order, which are read alone; of the query for "step_matrix", each with every
                training step. None: all.

        Returns:
            float32 [Q, n, T] (train_step: [Q, n, S]); "step_matrix": [Q, n, S, T]. Over query_step it adds up to the
            total influence.

        Raises:
            ValueError: as in `search`.
            UnknownExampleError: an id is not in the index.
        """
        return self.trajectories_with_errors(query_sketches, example_ids, resolve, steps)[0]

    def standard_errors(
        self,
        query_sketches: Any,
        example_ids: Sequence[str],
        resolve: TrajectoryResolve = "query_step",
        steps: Sequence[int] | None = None,
    ) -> np.ndarray:
        """The standard error of each number of `trajectories`, of the same shape."""
        return self.trajectories_with_errors(query_sketches, example_ids, resolve, steps)[1]

    def trajectories_with_errors(
        self,
        query_sketches: Any,
        example_ids: Sequence[str],
        resolve: TrajectoryResolve = "query_step",
        steps: Sequence[int] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """`trajectories` and `standard_errors` at the cost of one of them."""
        sketches, _ = checked_sketches(query_sketches, self.width)
        rows = np.array([self.row_of(example_id) for example_id in example_ids], dtype=np.int64)
        if resolve == "step_matrix":
            chosen = chosen_steps(steps, sketches.shape[1])
            wanted = [Pair(slot, step) for slot in range(self.num_steps) for step in chosen]
        else:
            every = pairs(resolve, self.num_steps, sketches.shape[1])
            wanted = [every[step] for step in chosen_steps(steps, len(every))]
        vectors = query_vectors(sketches, self.config)  # [Q, T + 1, W]
        decoded = {slot: self.codes.decoded(slot, rows) for slot in {pair.slot for pair in wanted}}
        norms = np.linalg.norm(vectors, axis=2)
        influences = np.empty((len(sketches), len(rows), len(wanted)), np.float32)
        errors = np.empty_like(influences)
        for place, (slot, query) in enumerate(wanted):
            found = influences[:, :, place] = inner_products(vectors[:, query], decoded[slot])  # [Q, n]
            errors[:, :, place] = self._errors(found, self.codes.norms_of(slot, rows), norms[:, query, None])
        if resolve == "step_matrix":
            shape = (len(sketches), len(rows), self.num_steps, len(wanted) // self.num_steps)
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
    ) -> tuple[dict[Pair, list[tuple[_Side, _Side]]], Coverage]:
        """Each pair's proponents and opponents for each query; one scan for a slot."""
        found, mine = {}, {pair.slot: list[Pair]() for pair in wanted}
        by_vector = vectors.swapaxes(0, 1)  # [T + 1, Q, W]
        for pair in sorted(wanted, key=lambda pair: pair.query % len(by_vector)):
            mine[pair.slot].append(pair)
        asked = {  # [pairs * Q, W] of each slot
            slot: _taken(by_vector, [pair.query for pair in own]).reshape(-1, self.width) for slot, own in mine.items()
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
            counts = [len(rows) for rows, _ in ranked[slot]]
            rows, scores = (np.concatenate(each) for each in zip(*ranked[slot], strict=True))
            query_norms = np.repeat(np.linalg.norm(queries, axis=1), counts)
            errors = self._errors(scores, self.codes.norms_of(slot, rows), query_norms)
            sides = _sides((rows, scores, errors), np.cumsum(counts), k)
            for place, pair in enumerate(mine[slot]):
                found[pair] = sides[place * len(vectors) : (place + 1) * len(vectors)]
        return found, reduce(and_, coverages)

    def _efforts(self, slot: int | None) -> list[int]:
        """That the build found each part's FAISS indices to need; 1 where an earlier version built them."""
        return [each.get("efforts", {}).get(slot_name(slot), 1) for each in self._recalls]

    def _least_recall(self, slots: set[int | None]) -> float:
        return min(each["by_slot"][slot_name(slot)] for each in self._recalls for slot in slots)

    def _influencers(self, found: Sequence[tuple[int | None, tuple[_Side, _Side]]]) -> list[Influencers]:
        """Of each step; one look at the ids for all of them."""
        sides = [side for _, both in found for side in both]
        ids = iter(self.ids_in(np.concatenate([rows for rows, _, _ in sides])))
        ranked = iter(
            [
                Ranked(example_ids=tuple(islice(ids, len(rows))), rows=rows, influences=scores, standard_errors=errors)
                for rows, scores, errors in sides
            ]
        )
        return [Influencers(step=step, proponents=next(ranked), opponents=next(ranked)) for step, _ in found]

    def _errors(self, influences: np.ndarray, norms: np.ndarray, query_norms: Any) -> np.ndarray:
        return standard_errors(influences, norms, query_norms, width=self.width, bits=self.bits)


def _taken(arrays: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Some of several arrays; all of them, in their order, without a copy."""
    every = [place % len(arrays) for place in places] == list(range(len(arrays)))
    return arrays if every else arrays[list(places)]


def _sides(candidates: _Side, ends: np.ndarray, k: int) -> list[tuple[_Side, _Side]]:
    """The k strongest above zero and below it of each query.

    Args:
        candidates: from the largest score to the smallest, then by row, of one query after another.
        ends: where those of each query end.
        k: of each side.
    """
    places, counts = np.empty(len(candidates[1]), np.int64), np.empty((len(ends), 2), np.int64)
    strongest(candidates[1], ends, k, places, counts)
    edges = [0, *np.cumsum(counts).tolist()]
    rows, scores, errors = (column[places[: edges[-1]]] for column in candidates)
    sides = [(rows[begin:end], scores[begin:end], errors[begin:end]) for begin, end in pairwise(edges)]
    return list(zip(sides[::2], sides[1::2], strict=True))
