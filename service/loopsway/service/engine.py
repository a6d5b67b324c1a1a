"""One served index: resolves queries into sketches, then searches.

Q queries, n examples, S steps, W width. Lives in one event loop; searches run in threads beside it, the model in
a process (worker.py). Knows no gRPC and no messages.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from loopsway.indexer import FilterError, Index, IndexDamagedError, Neighbors, Ranking, Scores, find_neighbors
from loopsway.indexer.config import Resolve
from loopsway.indexer.search.index import TrajectoryResolve
from loopsway.indexer.search.nearest import By
from loopsway.indexer.search.sharded import ShardsUnavailableError

from .errors import InvalidFieldError, PreconditionError, QueueFullError, UnavailableError, UnknownNameError
from .model import ModelQuery, QueryModel
from .queries import Query, ResolvedQuery, SketchQuery
from .record import part
from .settings import Settings
from .worker import ModelWorker

_Result = TypeVar("_Result")
GoOn: TypeAlias = Callable[[], None]

# Memory that one GetTrajectories may take for decoded rows.
DECODED_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Curves:
    """The influence of some examples on one query at every step; arrays float32 [n, S]."""

    example_ids: Sequence[str]
    influences: NDArray[np.float32]
    standard_errors: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, eq=False)
class Influences:
    """One query's answer: what it was resolved to, its rankings, and the curves of those in them if asked for."""

    query: ResolvedQuery
    ranking: Ranking
    curves: Curves | None = None

    @property
    def influencers(self) -> tuple[str, ...]:
        """Ids of all in the rankings, as often as they are there."""
        rankings = (self.ranking.total, *self.ranking.steps)
        return tuple(each for ranking in rankings for ranked in (ranking.proponents, ranking.opponents)
                     for each in ranked.example_ids)  # fmt: skip

    @property
    def example_ids(self) -> tuple[str, ...]:
        """Of all in the rankings, each once."""
        return tuple(dict.fromkeys(self.influencers))

    def cut(self, num_proponents: int, num_opponents: int) -> Influences:
        """With so many of each sign in each ranking, at the most."""
        total, *steps = (
            replace(
                each, proponents=each.proponents.first(num_proponents), opponents=each.opponents.first(num_opponents)
            )
            for each in (self.ranking.total, *self.ranking.steps)
        )
        return replace(self, ranking=replace(self.ranking, total=total, steps=tuple(steps)))


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectories:
    """The answer for all queries of one request.

    Attributes:
        influences: float32 [Q, n, S], or [Q, n, S_train, S_query] for "step_matrix".
        standard_errors: the same shape.
    """

    queries: Sequence[ResolvedQuery]
    influences: NDArray[np.float32]
    standard_errors: NDArray[np.float32]


class Engine:
    """Answers queries from one index. Use it within one event loop, and close it.

    Args:
        index: open; it is read from several threads.
        model: for queries that are examples. None: sketches only.
        settings: the limits.

    Attributes:
        index: that it answers from.
        num_admitted: requests that run or wait now.
    """

    def __init__(self, index: Index, model: QueryModel | None = None, *, settings: Settings | None = None) -> None:
        self.index = index
        self._model = model
        self._settings = settings or Settings()
        self.num_admitted = 0
        self._threads = ThreadPoolExecutor(
            self._settings.search_threads, thread_name_prefix=f"search-{self.index.name}"
        )

    @property
    def name(self) -> str:
        return self.index.name

    @property
    def accepts_examples(self) -> bool:
        return self._model is not None

    @property
    def max_gradient_bytes(self) -> int:
        """Of one query that comes as gradients; 0 where the index takes none."""
        return 0 if self.index.config.optimizer_aware else self._settings.max_gradient_bytes

    @property
    def num_waiting(self) -> int:
        """Queries that wait for the model."""
        return 0 if self._model is None else self._model.num_waiting

    async def find_influences(
        self,
        queries: Sequence[Query],
        *,
        k: int,
        resolve: Resolve,
        steps: Sequence[int] | None,
        where: str | None,
        exact: bool = True,
        deadline: float | None = None,
        require_full_coverage: bool = False,
    ) -> list[Influences]:
        """Ranks the index's examples for each query; arguments as for `Index.search`.

        With `require_full_coverage`, an answer that misses a shard is refused.

        Raises:
            RequestError: the request can't be answered, or not now.
        """
        with self._place():
            resolved = await self._resolve(queries)
            rankings = await self._in_thread(
                lambda go_on: self._search(resolved, k, resolve, steps, where, exact, go_on, deadline)
            )
        if require_full_coverage:
            self._refuse_partial(ranking.coverage for ranking in rankings)
        return [Influences(query=query, ranking=ranking) for query, ranking in zip(resolved, rankings, strict=True)]

    async def with_curves(self, answers: Sequence[Influences], resolve: Resolve) -> list[Influences]:
        """The same answers with curves; part of the request that they are of, so it waits for no place.

        Raises:
            InvalidFieldError: they are too large for one message.
        """
        ids = [answer.example_ids for answer in answers]
        slots = [self.index.num_steps if resolve == "train_step" else answer.query.num_steps for answer in answers]
        size = 2 * 4 * sum(len(each) * count for each, count in zip(ids, slots, strict=True))
        if size > self._settings.max_message_bytes:
            raise InvalidFieldError(
                f"the trajectories are {size} bytes, expected at most {self._settings.max_message_bytes}: lower k, "
                "name fewer steps, or ask for fewer queries in one request",
                field="include_trajectories",
            )
        curves = await self._in_thread(
            lambda go_on: [self._curves(*each, resolve, go_on) for each in zip(answers, ids, slots, strict=True)]
        )
        return [replace(answer, curves=each) for answer, each in zip(answers, curves, strict=True)]

    async def trajectories(
        self, queries: Sequence[Query], example_ids: Sequence[str], resolve: TrajectoryResolve
    ) -> Trajectories:
        """Influences of the examples on each query, step by step; arguments as for `Index.trajectories`.

        Raises:
            RequestError: the request can't be answered, or not now.
        """
        self._check_ids(example_ids)
        with self._place():
            resolved = await self._resolve(queries)
            self._check_size(resolved, len(example_ids), resolve)
            influences, errors = await self._in_thread(
                lambda go_on: self._trajectories(resolved, example_ids, resolve, go_on)
            )
        return Trajectories(queries=resolved, influences=influences, standard_errors=errors)

    async def scores(
        self,
        queries: Sequence[Query],
        *,
        resolve: Resolve,
        where: str | None,
        deadline: float | None = None,
        require_full_coverage: bool = False,
    ) -> tuple[list[ResolvedQuery], Scores]:
        """Influences of every example on the mean of the queries; arguments as for `Index.scores`, and as above.

        Raises:
            RequestError: the request can't be answered, or not now.
        """
        with self._place():
            resolved = await self._resolve(queries)
            scores = await self._in_thread(lambda go_on: self._scores(resolved, resolve, where, go_on, deadline))
        if require_full_coverage:
            self._refuse_partial([scores.coverage])
        return resolved, scores

    async def neighbors(
        self,
        example_ids: Sequence[str],
        *,
        k: int,
        by: By,
        step: int | None,
        threshold: float | None,
        where: str | None,
        deadline: float | None = None,
        require_full_coverage: bool = False,
    ) -> list[Neighbors]:
        """The examples most like each of these; arguments as for `find_neighbors`, and as above.

        Raises:
            RequestError: the request can't be answered, or not now.
        """
        self._check_ids(example_ids)

        def find(_: GoOn) -> list[Neighbors]:
            with _refusing("step"):
                return find_neighbors(
                    self.index,
                    example_ids,
                    k,
                    by=by,
                    step=step,
                    threshold=threshold,
                    where=where,
                    deadline=deadline,
                )

        with self._place():
            found = await self._in_thread(find)
        if require_full_coverage:
            self._refuse_partial(each.coverage for each in found)
        return found

    async def sketches(self, queries: Sequence[Query]) -> list[ResolvedQuery]:
        """What the queries are resolved to.

        Raises:
            RequestError: the request can't be answered, or not now.
        """
        with self._place():
            return await self._resolve(queries)

    async def warm_up(self, worker: ModelWorker) -> None:
        """Loads the model, searches once and answers one query, so that no request pays for what happens but once.

        Raises:
            LoadError: the task can't be loaded, or its model makes other sketches than the index holds.
        """
        await self._in_thread(lambda _: self.index.warm_up())
        rows = self.index.sketched_rows()[:2].tolist()
        query = None
        if self._model is not None:
            await self._model.load(worker)
            query = await self._model.warm_up(rows) if rows else None
        if query is None:
            noise = np.random.default_rng(0).standard_normal((self.index.num_steps, self.index.width))
            query = ResolvedQuery(sketch=noise.astype(np.float32))
        example_ids = [self.index.example(row).id for row in rows[:1]]
        if example_ids:
            await self._in_thread(lambda go_on: self._trajectories([query], example_ids, "query_step", go_on))

    def close(self) -> None:
        """Frees the model and waits for running searches; drops waiting ones.

        An engine that nobody holds any more closes by itself: one whose generation was replaced lives as long as the
        last request that found it.
        """
        if self._model is not None:
            self._model.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self.index.close()

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A place among the admitted requests, one of which runs while the others wait."""
        if self.num_admitted > self._settings.max_waiting:
            raise QueueFullError(
                f"index {self.name} has {self._settings.max_waiting} requests waiting, as many as it admits",
                retry_after_s=self._settings.retry_after_s,
            )
        self.num_admitted += 1
        try:
            yield
        finally:
            self.num_admitted -= 1

    async def _in_thread(self, work: Callable[[GoOn], _Result]) -> _Result:
        """Runs `work`, which calls what it is given between its costly parts: it ends there once it is cancelled."""
        is_cancelled = threading.Event()

        def go_on() -> None:
            if is_cancelled.is_set():
                raise asyncio.CancelledError("nobody waits for this any more")

        try:
            with part("queue") as passage:  # for a thread

                def begun() -> _Result:
                    passage.becomes("search")
                    return work(go_on)

                return await asyncio.get_running_loop().run_in_executor(self._threads, begun)
        except asyncio.CancelledError:
            is_cancelled.set()
            raise
        except ShardsUnavailableError as error:
            raise UnavailableError(str(error), retry_after_s=self._settings.retry_after_s) from error

    def _refuse_partial(self, coverages: Iterable[float]) -> None:
        if (least := min(coverages)) < 1:
            raise UnavailableError(
                f"{least:.0%} of the shards of index {self.name} answered in time, and all are required: ask again "
                "later, or without require_full_coverage",
                retry_after_s=self._settings.retry_after_s,
            )

    async def _resolve(self, queries: Sequence[Query]) -> list[ResolvedQuery]:
        resolved: list[ResolvedQuery | None] = [
            ResolvedQuery(sketch=query.values) if isinstance(query, SketchQuery) else None for query in queries
        ]
        examples = {i: query for i, query in enumerate(queries) if not isinstance(query, SketchQuery)}
        if examples:
            sketched = await self._sketch(list(examples.values()))
            for i, query in zip(examples, sketched, strict=True):
                resolved[i] = query
        return [query for query in resolved if query is not None]

    async def _sketch(self, queries: Sequence[ModelQuery]) -> list[ResolvedQuery]:
        if self._model is None:
            raise PreconditionError(
                f"index {self.name} is served without its model, and answers sketches only; serve it with its task "
                "(`loopsway serve --index ... --task ...`), or send a sketch",
                field=queries[0].field,
            )
        return await self._model.resolve(queries)

    def _search(
        self,
        queries: Sequence[ResolvedQuery],
        k: int,
        resolve: Resolve,
        steps: Sequence[int] | None,
        where: str | None,
        exact: bool,
        go_on: GoOn,
        deadline: float | None,
    ) -> list[Ranking]:
        rankings: dict[int, Ranking] = {}
        for rows in _by_steps(queries):
            sketches = np.stack([queries[row].sketch for row in rows])  # [Q, S, W]
            # Each field was checked before it came here: what is left is steps that the query doesn't have.
            with _refusing("steps" if steps else "resolve"):
                found = self.index.search(
                    sketches,
                    k=k,
                    resolve=resolve,
                    steps=steps,
                    where=where,
                    exact=exact,
                    go_on=go_on,
                    deadline=deadline,
                )
            rankings |= zip(rows, found, strict=True)
        return [rankings[row] for row in range(len(queries))]

    def _scores(
        self,
        queries: Sequence[ResolvedQuery],
        resolve: Resolve,
        where: str | None,
        go_on: GoOn,
        deadline: float | None,
    ) -> Scores:
        counts = sorted({query.num_steps for query in queries})
        if len(counts) > 1:
            raise InvalidFieldError(
                f"the queries have different numbers of steps, {counts}, and no mean; ask in separate requests",
                field="queries",
            )
        mean = np.mean([query.sketch for query in queries], axis=0, dtype=np.float64).astype(np.float32)
        with _refusing("resolve"):
            return self.index.scores(mean, resolve, where=where, go_on=go_on, deadline=deadline)

    def _trajectories(
        self, queries: Sequence[ResolvedQuery], example_ids: Sequence[str], resolve: TrajectoryResolve, go_on: GoOn
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        groups = _by_steps(queries)
        if len(groups) > 1 and resolve != "train_step":
            counts = sorted({query.num_steps for query in queries})
            raise InvalidFieldError(
                f"the queries have different numbers of steps, {counts}, which one tensor can't hold; ask for them "
                "in separate requests",
                field="queries",
            )
        results: dict[int, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
        for rows in groups:
            sketches = np.stack([queries[row].sketch for row in rows])  # [Q, S, W]
            with _refusing("resolve"):
                influences, errors = self._measure(sketches, example_ids, resolve, go_on)
            results |= zip(rows, zip(influences, errors, strict=True), strict=True)
        ordered = [results[row] for row in range(len(queries))]
        return np.stack([influence for influence, _ in ordered]), np.stack([error for _, error in ordered])

    def _measure(
        self, sketches: NDArray[np.float32], example_ids: Sequence[str], resolve: TrajectoryResolve, go_on: GoOn
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Influences and standard errors, a block of examples at a time: the index decodes all it is asked for."""
        slots = 1 if resolve == "query_step" else self.index.num_steps
        size = max(1, DECODED_BYTES // (slots * self.index.width * 4))
        blocks = [example_ids[start : start + size] for start in range(0, len(example_ids), size)]
        measured = []
        for block in blocks:
            go_on()
            measured.append(self.index.trajectories_with_errors(sketches, block, resolve))
        influences, errors = zip(*measured, strict=True)
        return np.concatenate(influences, axis=1), np.concatenate(errors, axis=1)

    def _curves(
        self, answer: Influences, example_ids: Sequence[str], num_steps: int, resolve: Resolve, go_on: GoOn
    ) -> Curves:
        if example_ids:
            influences, errors = self._measure(np.stack([answer.query.sketch]), example_ids, resolve, go_on)
        else:
            influences = errors = np.zeros((1, 0, num_steps), np.float32)
        return Curves(example_ids=example_ids, influences=influences[0], standard_errors=errors[0])

    def _check_ids(self, example_ids: Sequence[str]) -> None:
        for i, example_id in enumerate(example_ids):
            try:
                self.index.row_of(example_id)
            except LookupError as error:
                raise UnknownNameError(str(error), field=f"example_ids[{i}]") from error

    def _check_size(self, queries: Sequence[ResolvedQuery], num_examples: int, resolve: str) -> None:
        steps = max(query.num_steps for query in queries) if resolve != "train_step" else self.index.num_steps
        slots = steps * self.index.num_steps if resolve == "step_matrix" else steps
        size = 2 * 4 * len(queries) * num_examples * slots  # influences and standard errors, float32
        if size > self._settings.max_message_bytes:
            raise InvalidFieldError(
                f"{len(queries)} queries x {num_examples} examples x {slots} numbers are {size} bytes, expected at "
                f"most {self._settings.max_message_bytes}: ask for fewer in one request",
                field="example_ids",
            )


@contextmanager
def _refusing(field: str) -> Iterator[None]:
    """What the index refuses with a ValueError is the request's fault, unless the index itself is damaged."""
    try:
        yield
    except IndexDamagedError:
        raise
    except FilterError as error:
        raise InvalidFieldError(str(error), field="where") from error
    except ValueError as error:
        raise InvalidFieldError(str(error), field=field) from error


def _by_steps(queries: Sequence[ResolvedQuery]) -> list[list[int]]:
    """Positions of the queries, in groups of equal numbers of steps: one array can hold each."""
    groups: dict[int, list[int]] = {}
    for position, query in enumerate(queries):
        groups.setdefault(query.num_steps, []).append(position)
    return list(groups.values())
