"""The model beside an index: turns queries that are examples into sketches, in the one thread that may touch it.

S steps, W width. Task code is the user's, and what it reads may come from the network: a ValueError out of it is the
query's fault, a TaskError or anything else is the task's own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeAlias, TypeVar

from loopsway.indexer import ExampleSketcher, Index, Task, TaskError

from .batching import Batcher
from .errors import InvalidFieldError, PreconditionError, RequestError, UnknownNameError
from .queries import ExampleQuery, IdQuery, ResolvedQuery

ModelQuery: TypeAlias = ExampleQuery | IdQuery

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")


class QueryModel:
    """Sketches queries with a task's model. Use it within one event loop.

    Args:
        task: whose code reads and runs the examples.
        sketcher: of the same task, with the fingerprint of `index`.
        index: whose ids queries may name.
        batch_size: examples in one forward and backward, of one request or several.
        batch_delay_s: as `Batcher`'s.
    """

    def __init__(
        self, task: Task, sketcher: ExampleSketcher, index: Index, *, batch_size: int, batch_delay_s: float = 0.0
    ) -> None:
        self._task, self._sketcher, self._index = task, sketcher, index
        self._examples = task.examples()
        # One thread, because hooks on one model can't serve two callers. A cancelled request's waiting calls are
        # dropped from its queue unstarted.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"model-{index.name}")
        self._batches: Batcher[ModelQuery, ResolvedQuery | RequestError] = Batcher(
            self._answer, batch_size=batch_size, delay_s=batch_delay_s
        )

    async def resolve(self, queries: Sequence[ModelQuery]) -> list[ResolvedQuery]:
        """Sketches the queries, together with those of other requests that wait.

        Raises:
            InvalidFieldError: a query is none that the task can read or run.
            UnknownNameError: an id is not in the index.
            PreconditionError: the task can't answer this kind of query.
        """
        found = await self._batches.run(queries)
        return [_sketched(each, query.field) for each, query in zip(found, queries, strict=True)]

    async def warm_up(self) -> ResolvedQuery:
        """Runs the model on an indexed example and on two, so that no request pays for what a first batch costs."""
        (first,) = await self._run(lambda: self._sketch([self._examples[0]]))
        with suppress(ValueError):  # examples of unequal steps share no batch
            await self._run(lambda: self._sketch([self._examples[row] for row in range(min(2, len(self._examples)))]))
        return first

    def close(self) -> None:
        """Waits for a running model call; drops waiting ones."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    async def _run(self, work: Callable[[], _Result]) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _answer(self, queries: Sequence[ModelQuery]) -> list[ResolvedQuery | RequestError]:
        return await self._run(lambda: self._read_and_sketch(queries))

    def _read_and_sketch(self, queries: Sequence[ModelQuery]) -> list[ResolvedQuery | RequestError]:
        """Each query's sketch, or what it is refused for."""
        examples: dict[int, Any] = {}
        refused: dict[int, RequestError] = {}
        for place, query in enumerate(queries):
            try:
                examples[place] = self._example(query)
            except RequestError as error:
                refused[place] = error
        sketched = dict(zip(examples, self._sketch(list(examples.values())) if examples else [], strict=True))
        return [refused[place] if place in refused else sketched[place] for place in range(len(queries))]

    def _sketch(self, examples: Sequence[Any]) -> list[ResolvedQuery]:
        sketches = self._sketcher.sketch(examples)
        values, losses = sketches.values.numpy(), sketches.losses.numpy()  # [B, S, W], [K, B]
        return [
            ResolvedQuery(
                sketch=values[i],
                losses=tuple(losses[:, i].tolist()),
                steps_without_gradient=sketches.steps_without_gradient,
            )
            for i in range(len(examples))
        ]

    def _example(self, query: ModelQuery) -> Any:
        if isinstance(query, ExampleQuery):
            return self._example_from_json(query)
        try:
            row = self._index.row_of(query.example_id)
        except LookupError as error:
            raise UnknownNameError(str(error), field=query.field) from error
        if row >= len(self._examples) or self._task.example_id(row) != query.example_id:
            raise PreconditionError(
                f"the task's examples changed since index {self._index.name} was built: row {row} is no longer "
                f"{query.example_id!r}; rebuild the index or serve the task that it was built from",
                field=query.field,
            )
        return self._examples[row]

    def _example_from_json(self, query: ExampleQuery) -> Any:
        name = type(self._task).__name__
        try:
            return self._task.example_from_json(query.obj)
        except ValueError as error:
            raise InvalidFieldError(f"not an example of {name}: {error}", field=query.field) from error
        except NotImplementedError as error:
            raise PreconditionError(
                f"{name} takes no JSON queries (it defines no example_from_json): ask by example id or sketch",
                field=query.field,
            ) from error
        except (LookupError, TypeError, AttributeError) as error:
            # Task authors index into the object without checking; the caller still deserves the blame and the hint.
            _log.warning("%s.example_from_json failed without a ValueError", name, exc_info=True)
            raise InvalidFieldError(
                f"not an example of {name}: its example_from_json could not read this JSON", field=query.field
            ) from error


def _sketched(found: ResolvedQuery | BaseException, field: str) -> ResolvedQuery:
    """A query's sketch, unless the request is refused for it."""
    if isinstance(found, ValueError) and not isinstance(found, TaskError | RequestError):
        raise InvalidFieldError(f"the model can't run this example: {found}", field=field) from found
    if isinstance(found, BaseException):
        raise found
    return found
