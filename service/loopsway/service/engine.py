"""One served index: resolves queries into sketches, then asks the index about them.

Q queries, n examples, S steps, W width. Lives in one event loop; searches run in threads beside it, the model in
a process (worker.py). Knows no gRPC and no messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np

from loopsway.indexer import Index, Neighbors, Scores
from loopsway.indexer.building.verification import check_added
from loopsway.indexer.config import Resolve
from loopsway.indexer.search.index import TrajectoryResolve
from loopsway.indexer.search.nearest import By
from loopsway.indexer.search.sharded import ShardsUnavailableError

from . import questions
from .admission import Admission, Place, StageName
from .answers import Influences, Trajectories
from .errors import InvalidFieldError, PreconditionError, UnavailableError, UnknownNameError
from .gradient_sketches import GrowingSketch, LocalSketch
from .memory import enough_memory
from .model import ModelQuery, QueryModel
from .queries import Query, ResolvedQuery, SketchQuery
from .search_threads import GoOn, SearchThreads, Work
from .settings import Settings
from .worker import ModelWorker

_Result = TypeVar("_Result")


class Engine:
    """Answers queries from one index. Use it within one event loop, and close it.

    Args:
        index: open; it is read from several threads.
        model: for queries that are examples. None: sketches only.
        settings: the limits.

    Attributes:
        index: that it answers from.
        admission: the requests that run or wait.
    """

    def __init__(self, index: Index, model: QueryModel | None = None, *, settings: Settings | None = None) -> None:
        self.index = index
        self._model = model
        self._settings = settings or Settings()
        self.admission = Admission(index.name, self._settings)
        self._threads = SearchThreads(self._settings.search_threads, f"search-{index.name}")

    @property
    def name(self) -> str:
        return self.index.name

    @property
    def accepts_examples(self) -> bool:
        return self._model is not None

    @property
    def max_gradient_bytes(self) -> int:
        """Of one query that comes as gradients; 0 where the index takes none."""
        is_scaled = self.index.config.optimizer_aware and self._model is None
        return 0 if is_scaled else self._settings.max_gradient_bytes

    @property
    def num_admitted(self) -> int:
        """Requests that run or wait now."""
        return self.admission.num_admitted

    @property
    def num_waiting(self) -> int:
        """Queries that wait for the model."""
        return 0 if self._model is None else self._model.num_waiting

    @property
    def expected_wait_s(self) -> float:
        """For how long a query for the model that comes now is expected to wait."""
        return self.admission.expected_wait_s(for_model=True, for_thread=not self._threads.has_free)

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
        finish: Callable[[list[Influences], GoOn], _Result],
    ) -> _Result:
        """Ranks the index's examples for each query; arguments as for `Index.search`.

        With `require_full_coverage`, an answer that misses a shard is refused. What is made of the rankings is made by
        `finish`, in the thread that searched: what they consist of is still in its processor's cache.

        Raises:
            RequestError: the request can't be answered, or not now.
        """
        question = questions.RankingQuestion(
            k=k, resolve=resolve, steps=steps, where=where, exact=exact, deadline=deadline
        )

        def answer(go_on: GoOn) -> _Result:
            rankings = question.ask(self.index, resolved, go_on)
            if require_full_coverage:
                self._refuse_partial(ranking.coverage for ranking in rankings)
            found = zip(resolved, rankings, strict=True)
            return finish([Influences(query=query, ranking=ranking) for query, ranking in found], go_on)

        with self._place(queries, "rank") as place:
            resolved = await self._resolve(queries, place)
            return await self._ask(answer, place, "rank")

    def with_curves(self, answers: Sequence[Influences], resolve: Resolve, go_on: GoOn) -> list[Influences]:
        """The same answers with curves, for who finishes them.

        Raises:
            InvalidFieldError: they are too large for one message.
        """
        slots = [self.index.num_steps if resolve == "train_step" else answer.query.num_steps for answer in answers]
        size = 2 * 4 * sum(len(answer.example_ids) * count for answer, count in zip(answers, slots, strict=True))
        if size > self._settings.max_message_bytes:
            raise InvalidFieldError(
                f"the trajectories are {size} bytes, expected at most {self._settings.max_message_bytes}: lower k, "
                "name fewer steps, or ask for fewer queries in one request",
                field="include_trajectories",
            )

        return [
            replace(answer, curves=questions.curves(self.index, answer, count, resolve, go_on))
            for answer, count in zip(answers, slots, strict=True)
        ]

    async def trajectories(
        self,
        queries: Sequence[Query],
        example_ids: Sequence[str],
        resolve: TrajectoryResolve,
        steps: Sequence[int] | None = None,
    ) -> Trajectories:
        """Influences of the examples on each query, step by step; arguments as for `Index.trajectories`.

        Raises:
            RequestError: the request can't be answered, or not now.
        """
        self._check_ids(example_ids)
        with self._place(queries, "measure") as place:
            resolved = await self._resolve(queries, place)
            self._check_size(resolved, len(example_ids), resolve, steps)
            measure = partial(questions.trajectories, self.index, resolved, example_ids, resolve, steps)
            influences, errors = await self._ask(measure, place, "measure")
        steps = steps or range(influences.shape[-1])
        return Trajectories(queries=resolved, steps=steps, influences=influences, standard_errors=errors)

    async def scores(
        self,
        queries: Sequence[Query],
        *,
        resolve: Resolve,
        steps: Sequence[int] | None,
        where: str | None,
        deadline: float | None = None,
        require_full_coverage: bool = False,
    ) -> tuple[list[ResolvedQuery], Scores]:
        """Influences of every example on the mean of the queries; arguments as for `Index.scores`, and as above.

        Raises:
            RequestError: the request can't be answered, or not now.
        """
        with self._place(queries, "score") as place:
            resolved = await self._resolve(queries, place)
            score = partial(questions.mean_scores, self.index, resolved, resolve, steps, where, deadline)
            scores = await self._ask(score, place, "score")
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
        question = questions.NeighborsQuestion(
            example_ids=example_ids, k=k, by=by, step=step, threshold=threshold, where=where, deadline=deadline
        )
        with self.admission.place({"compare": len(example_ids)}, has_thread=self._threads.has_free) as place:
            found = await self._ask(partial(question.ask, self.index), place, "compare")
        if require_full_coverage:
            self._refuse_partial(each.coverage for each in found)
        return found

    async def sketches(self, queries: Sequence[Query]) -> list[ResolvedQuery]:
        """What the queries are resolved to.

        Raises:
            RequestError: the request can't be answered, or not now.
        """
        with self._place(queries) as place:
            return await self._resolve(queries, place)

    async def compare(self, before: Index) -> None:
        """Raises an IndexDamagedError if what its generation adds to an earlier one is not what was written."""
        index = self.index
        await self._ask(lambda go_on: check_added(index.folder, index.manifest, before.manifest, go_on))

    async def begin_gradients(self, num_steps: int) -> GrowingSketch:
        """The sketch of a query of so many steps that comes as gradients; close it.

        Raises:
            PreconditionError: the index is optimizer-aware, and served without the model that has its second moments.
            UnavailableError: it has them, but not now.
        """
        if not self.index.config.optimizer_aware:
            return LocalSketch(await asyncio.to_thread(lambda: self.index.gradient_sketcher.begin(num_steps)))
        if self._model is None:
            raise PreconditionError(
                f"index {self.name} is optimizer-aware and served without its model, and the second moments that scale "
                "gradients are in the task's checkpoints alone: serve it with its task (`loopsway serve --index ... "
                "--task ...`), or sketch where the task is (ExampleSketcher.gradient_sketcher) and send the sketch",
                field="header.index",
            )
        return await self._model.begin_gradients(num_steps)

    async def warm_up(self, worker: ModelWorker) -> None:
        """Loads the model, searches once and answers one query, so that no request pays for what happens but once.

        Raises:
            LoadError: the task can't be loaded, or its model makes other sketches than the index holds.
        """
        await self._ask(lambda _: self.index.warm_up())
        rows = self.index.sketched_rows()[:2].tolist()
        query = None
        if self._model is not None:
            await self._model.load(worker, self.admission.stages["sketch"].doing)
            query = await self._model.warm_up(rows) if rows else None
            self.admission.stages["sketch"].forget()  # first times say nothing of later ones
        if query is None:
            noise = np.random.default_rng(0).standard_normal((self.index.num_steps, self.index.width))
            query = ResolvedQuery(sketch=noise.astype(np.float32))
        example_ids = [self.index.example(row).id for row in rows[:1]]
        if example_ids:
            await self._ask(partial(questions.trajectories, self.index, [query], example_ids, "query_step", None))

    def close(self) -> None:
        """Frees the model and waits for running searches; drops waiting ones.

        An engine that nobody holds any more closes by itself: one whose generation was replaced lives as long as the
        last request that found it.
        """
        if self._model is not None:
            self._model.close()
        self._threads.close()
        self.index.close()

    def _place(self, queries: Sequence[Query], *kinds: StageName) -> AbstractContextManager[Place]:
        """A place for a request with these kinds of work beside sketching."""
        examples = sum(not isinstance(query, SketchQuery) for query in queries)
        work = dict.fromkeys(kinds, len(queries))
        work["sketch"] = examples
        return self.admission.place(work, has_thread=self._threads.has_free or not kinds)

    async def _ask(self, work: Work[_Result], place: Place | None = None, kind: StageName = "rank") -> _Result:
        """Runs work in a thread, when it is the turn of a request in this place; without one it comes first."""
        try:
            with enough_memory(f"a search of index {self.name}", self._settings):
                if place is None:
                    return await self._threads.run(work)
                stage = self.admission.stages[kind]
                return await self._threads.run(work, order=place.number, around=stage.doing(place.left(stage)))
        except ShardsUnavailableError as error:
            raise UnavailableError(str(error), retry_after_s=self._settings.retry_after_s) from error

    def _refuse_partial(self, coverages: Iterable[float]) -> None:
        if (least := min(coverages)) < 1:
            raise UnavailableError(
                f"{least:.0%} of the shards of index {self.name} answered in time, and all are required: ask again "
                "later, or without require_full_coverage",
                retry_after_s=self._settings.retry_after_s,
            )

    async def _resolve(self, queries: Sequence[Query], place: Place) -> list[ResolvedQuery]:
        examples = [query for query in queries if not isinstance(query, SketchQuery)]
        sketched = iter(await self._sketch(examples) if examples else ())
        place.passed(self.admission.stages["sketch"])
        return [
            ResolvedQuery(sketch=query.values) if isinstance(query, SketchQuery) else next(sketched)
            for query in queries
        ]

    async def _sketch(self, queries: Sequence[ModelQuery]) -> list[ResolvedQuery]:
        if self._model is None:
            raise PreconditionError(
                f"index {self.name} is served without its model, and answers sketches only; serve it with its task "
                "(`loopsway serve --index ... --task ...`), or send a sketch",
                field=queries[0].field,
            )
        return await self._model.resolve(queries)

    def _check_ids(self, example_ids: Sequence[str]) -> None:
        for i, example_id in enumerate(example_ids):
            try:
                self.index.row_of(example_id)
            except LookupError as error:
                raise UnknownNameError(str(error), field=f"example_ids[{i}]") from error

    def _check_size(
        self, queries: Sequence[ResolvedQuery], num_examples: int, resolve: str, steps: Sequence[int] | None
    ) -> None:
        every = max(query.num_steps for query in queries) if resolve != "train_step" else self.index.num_steps
        num_steps = every if steps is None else len(steps)
        slots = num_steps * self.index.num_steps if resolve == "step_matrix" else num_steps
        size = 2 * 4 * len(queries) * num_examples * slots  # influences and standard errors, float32
        if size > self._settings.max_message_bytes:
            raise InvalidFieldError(
                f"{len(queries)} queries x {num_examples} examples x {slots} numbers are {size} bytes, expected at "
                f"most {self._settings.max_message_bytes}: ask for fewer in one request",
                field="example_ids",
            )
