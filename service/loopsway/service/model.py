"""The model of one index, as the server sees it: queries that are examples become sketches, in the model's process.

S steps, W width. Queries of several requests share batches.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from itertools import count
from typing import Any, TypeAlias

from loopsway.indexer import Index, TaskError

from .batching import Batcher
from .errors import InvalidFieldError, PreconditionError, RequestError, UnavailableError, UnknownNameError
from .frames import Message
from .gradient_sketches import ModelSketch
from .queries import ExampleQuery, IdQuery, ResolvedQuery
from .record import Passage, part
from .settings import Settings
from .worker import ModelWorker

ModelQuery: TypeAlias = ExampleQuery | IdQuery
Doing: TypeAlias = Callable[[int], AbstractContextManager[None]]
Answer: TypeAlias = ResolvedQuery | Message  # a sketch, or what the query is refused for

_numbers = count(1)


class QueryModel:
    """Sketches queries with an index's model. Use it within one event loop.

    Args:
        index: whose ids queries may name.
        task_spec: the task to run.
        task_arguments: for the task's constructor.
        settings: the limits.
        device: a torch device name.
    """

    def __init__(
        self, index: Index, task_spec: str, task_arguments: dict[str, Any], settings: Settings, *, device: str
    ) -> None:
        self._index, self._settings = index, settings
        self._facts: Message = {
            "name": index.name,
            "path": str(index.path),
            "generation": index.generation,
            "task": task_spec,
            "arguments": task_arguments,
            "device": device,
        }
        # Two generations of one index are loaded side by side while one replaces the other.
        self._key = f"{index.name}, generation {index.generation}, load {next(_numbers)}"
        self._forget: weakref.finalize[..., QueryModel] | None = None
        self._worker: ModelWorker | None = None  # where it is loaded
        self._batches: Batcher[tuple[Message, Passage], Answer] | None = None

    @property
    def num_waiting(self) -> int:
        """Queries that wait."""
        return 0 if self._batches is None else self._batches.num_waiting

    async def load(self, worker: ModelWorker, doing: Doing = nullcontext) -> None:
        """Loads the task and its models.

        Args:
            worker: whose process runs them.
            doing: gives what is entered while so many queries are sketched together.

        Raises:
            LoadError: the task can't be loaded, or its model makes other sketches than the index holds.
        """
        await worker.load(self._key, self._facts)
        # With the last reference to it, which may go in any thread, the models go.
        self._forget = weakref.finalize(self, _forget, asyncio.get_running_loop(), worker, self._key)
        self._forget.atexit = False
        self._worker = worker
        self._batches = Batcher(
            partial(_sketched, worker, self._key, doing),
            batch_size=self._settings.batch_size,
            delay_s=self._settings.batch_delay_s,
            shared_faults=UnavailableError,
        )

    async def warm_up(self, rows: Sequence[int]) -> ResolvedQuery | None:
        """Runs the model on the first of these rows' examples and on all, so that no request pays for first times.

        None where the task has no such examples any more, or can't run them.
        """
        first, *_ = await self._run([{"row": row} for row in rows[:1]])
        if isinstance(first, BaseException) and (isinstance(first, TaskError) or not isinstance(first, ValueError)):
            raise first
        await self._run([{"row": row} for row in rows])
        return first if isinstance(first, ResolvedQuery) else None

    async def resolve(self, queries: Sequence[ModelQuery]) -> list[ResolvedQuery]:
        """Sketches the queries, together with those of other requests that wait.

        Raises:
            InvalidFieldError: a query is none that the task can read or run.
            UnknownNameError: an id is not in the index.
            PreconditionError: the task can't answer this kind of query.
            UnavailableError: the models are not loaded yet, their process died, or has no memory for the query.
        """
        found = await self._run([self._item(query) for query in queries])
        return [self._checked(each, query.field) for each, query in zip(found, queries, strict=True)]

    async def begin_gradients(self, num_steps: int) -> ModelSketch:
        """The sketch of a query that comes as gradients, scaled by the task's second moments; close it.

        Raises:
            UnavailableError: the models are not loaded yet, or their process died.
        """
        if self._worker is None:
            raise self._not_loaded("gradients")
        return await self._worker.begin_gradients(self._key, num_steps)

    def close(self) -> None:
        """Frees the models."""
        if self._forget is not None:
            self._forget()

    async def _run(self, items: Sequence[Message]) -> list[Answer | BaseException]:
        if self._batches is None:  # the server listens before its models are loaded
            raise self._not_loaded("examples")
        with part("queue") as passage:  # for a batch
            return await self._batches.run([(item, passage) for item in items])

    def _not_loaded(self, what: str) -> UnavailableError:
        return UnavailableError(
            f"index {self._index.name} is being warmed up and takes no {what} yet; it answers sketches, and says "
            "SERVING by gRPC's health protocol once it is ready",
            retry_after_s=self._settings.retry_after_s,
        )

    def _item(self, query: ModelQuery) -> Message:
        if isinstance(query, ExampleQuery):
            return {"json": query.text}
        try:
            return {"row": self._index.row_of(query.example_id), "id": query.example_id}
        except LookupError as error:
            raise UnknownNameError(str(error), field=query.field) from error

    def _checked(self, found: Answer | BaseException, field: str) -> ResolvedQuery:
        """A query's sketch, unless the request is refused for it."""
        if isinstance(found, ResolvedQuery):
            return found
        if isinstance(found, BaseException):
            if isinstance(found, ValueError) and not isinstance(found, TaskError | RequestError):
                raise InvalidFieldError(f"the model can't run this example: {found}", field=field) from found
            raise found
        match found["refused"]:
            case "invalid":
                raise InvalidFieldError(found["text"], field=field)
            case "precondition":
                raise PreconditionError(found["text"], field=field)
            case _:
                raise UnavailableError(found["text"], retry_after_s=self._settings.retry_after_s)


async def _sketched(
    worker: ModelWorker,
    key: str,
    doing: Doing,
    items: Sequence[tuple[Message, Passage]],
) -> list[Answer]:
    for _, passage in items:
        passage.becomes("sketch")
    with doing(len(items)):
        reply, arrays = await worker.sketch(key, [item for item, _ in items])
    sketches = iter(arrays)
    return [
        result
        if "refused" in result
        else ResolvedQuery(
            sketch=next(sketches), losses=tuple(result["losses"]), steps_without_gradient=tuple(result["silent"])
        )
        for result in reply["results"]
    ]


def _forget(loop: asyncio.AbstractEventLoop, worker: ModelWorker, key: str) -> None:
    with suppress(RuntimeError):  # the loop is closed: so is the worker
        loop.call_soon_threadsafe(worker.forget, key)
