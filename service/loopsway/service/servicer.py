"""The Attribution service: each method decodes, asks the engine, encodes. refusals.py knows the status codes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from google.protobuf.message import Message
from google.rpc import code_pb2

from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionServicer
from loopsway.v1.tensors import to_tensor

from . import decoding, encoding, gradients, record
from .answers import Influences
from .catalog import Catalog
from .engine import Engine
from .errors import InvalidFieldError, QueueFullError, RequestError, UnknownNameError, in_field
from .limits import check_limits
from .memory import enough_memory
from .queries import Query
from .record import goes_on_as, note, part
from .refusals import failure_of, internal_failure, refuse, refuse_as_internal
from .search_threads import GoOn
from .settings import Settings
from .streams import StreamPlaces, in_order, taken_in, unstalled
from .stretches import stretches
from .tokens import allowed, check_allowed, rate_allows

_log = logging.getLogger(__name__)
_Response = TypeVar("_Response", bound=Message)
_Answer = TypeVar("_Answer")

# Of the time that a request has left, what shards may take: the rest is for what is made of their answers.
SHARDS_SHARE = 0.9
MAX_TAG = 256


class Servicer(AttributionServicer):
    """Answers from the engines, by their names.

    Args:
        engines: by the indices' names; looked at anew by each request.
        settings: the limits.
    """

    def __init__(self, engines: Catalog, settings: Settings) -> None:
        self._engines = engines
        self._settings = settings
        self._streams = StreamPlaces(settings)

    def end_streams(self) -> None:
        """Lets streams of queries end once what was read of them is answered."""
        self._streams.end()

    async def GetIndex(  # noqa: N802  # the proto's name
        self, request: pb.GetIndexRequest, context: Any
    ) -> pb.GetIndexResponse:
        async def answer() -> pb.GetIndexResponse:
            return pb.GetIndexResponse(index=await self._described(self._engine(request.index)))

        return await _answered(context, answer)

    async def ListIndices(  # noqa: N802  # the proto's name
        self, request: pb.ListIndicesRequest, context: Any
    ) -> pb.ListIndicesResponse:
        async def answer() -> pb.ListIndicesResponse:
            names = sorted(allowed(self._engines))
            return pb.ListIndicesResponse(indices=[await self._described(self._engines[name]) for name in names])

        return await _answered(context, answer)

    async def FindInfluences(  # noqa: N802  # the proto's name
        self, request: pb.FindInfluencesRequest, context: Any
    ) -> pb.FindInfluencesResponse:
        return await _answered(context, lambda: self._find_influences(request, _deadline(context)))

    async def StreamInfluences(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]  # writes by itself
        self, request_iterator: AsyncIterator[pb.StreamInfluencesRequest], context: Any
    ) -> None:
        await _answered(context, lambda: self._stream_influences(request_iterator, context))

    async def GetTrajectories(  # noqa: N802  # the proto's name
        self, request: pb.GetTrajectoriesRequest, context: Any
    ) -> pb.GetTrajectoriesResponse:
        return await _answered(context, lambda: self._get_trajectories(request))

    async def ScoreExamples(  # noqa: N802  # pyright: ignore[reportIncompatibleMethodOverride]  # writes by itself
        self, request: pb.ScoreExamplesRequest, context: Any
    ) -> None:
        await _answered(context, lambda: self._score_examples(request, context))

    async def FindNeighbors(  # noqa: N802  # the proto's name
        self, request: pb.FindNeighborsRequest, context: Any
    ) -> pb.FindNeighborsResponse:
        return await _answered(context, lambda: self._find_neighbors(request, _deadline(context)))

    async def SketchQueries(  # noqa: N802  # the proto's name
        self, request: pb.SketchQueriesRequest, context: Any
    ) -> pb.SketchQueriesResponse:
        return await _answered(context, lambda: self._sketch_queries(request))

    async def SketchGradients(  # noqa: N802  # the proto's name
        self, request_iterator: AsyncIterator[pb.SketchGradientsRequest], context: Any
    ) -> pb.SketchGradientsResponse:
        return await _answered(context, lambda: self._sketch_gradients(request_iterator))

    async def ReloadIndex(  # noqa: N802  # the proto's name
        self, request: pb.ReloadIndexRequest, context: Any
    ) -> pb.ReloadIndexResponse:
        async def answer() -> pb.ReloadIndexResponse:
            engine = await self._engines.reload(self._engine(request.index).name)
            return pb.ReloadIndexResponse(index=await self._described(engine))

        return await _answered(context, answer)

    async def _find_influences(
        self, request: pb.FindInfluencesRequest, deadline: float | None
    ) -> pb.FindInfluencesResponse:
        engine, settings = self._engine(request.index), self._settings
        counts = decoding.counts_from(request, settings)
        resolve = decoding.resolve_from(request.resolve)
        steps = decoding.steps_from(request.steps)
        queries = self._queries(request.queries, engine)

        def finish(answers: list[Influences], go_on: GoOn) -> pb.FindInfluencesResponse:
            if counts[0] != counts[1]:
                answers = [answer.cut(*counts) for answer in answers]
            self._check_count(answers)
            if request.include_trajectories:
                answers = engine.with_curves(answers, resolve, go_on)
            goes_on_as("encode")
            return self._fitting(encoding.influences_response(answers, engine.index), "k")

        return await engine.find_influences(
            queries,
            k=max(counts),
            resolve=resolve,
            steps=steps,
            where=request.where or None,
            exact=not request.approximate,
            deadline=deadline,
            require_full_coverage=request.require_full_coverage,
            finish=finish,
        )

    async def _stream_influences(self, requests: AsyncIterator[pb.StreamInfluencesRequest], context: Any) -> None:
        settings = self._settings
        with self._streams.place():
            timed = self._streams.until_end(unstalled(aiter(requests), settings.stall_s))
            async with aclosing(in_order(timed, self._batch_answer, settings.stream_batches)) as responses:
                async for response in responses:
                    async with taken_in(settings.stall_s):
                        await context.write(response)

    async def _batch_answer(self, batch: pb.StreamInfluencesRequest) -> pb.StreamInfluencesResponse:
        await rate_allows()
        with record.batch() as noted:
            response = await self._outcome(batch)
            noted.code = code_pb2.Code.Name(response.failure.code)  # OK without a failure
        return response

    async def _outcome(self, batch: pb.StreamInfluencesRequest) -> pb.StreamInfluencesResponse:
        """The batch's answer, or its failure. Where a call would be told to come back, a stream waits."""
        while True:
            try:
                check_limits(batch, self._settings)
                deadline = time.monotonic() + self._settings.batch_timeout_s
                response = await self._find_influences(batch.request, deadline)
                return pb.StreamInfluencesResponse(tag=batch.tag, response=response)
            except QueueFullError as error:
                await asyncio.sleep(error.retry_after_s)
            except RequestError as error:
                return pb.StreamInfluencesResponse(tag=batch.tag[:MAX_TAG], failure=failure_of(error))
            except Exception:
                _log.exception("a batch of StreamInfluences failed")
                return pb.StreamInfluencesResponse(tag=batch.tag, failure=internal_failure())

    async def _get_trajectories(self, request: pb.GetTrajectoriesRequest) -> pb.GetTrajectoriesResponse:
        engine, settings = self._engine(request.index), self._settings
        resolve = decoding.trajectory_resolve_from(request.resolve)
        steps = decoding.steps_from(request.steps)
        example_ids = decoding.example_ids_from(request.example_ids, settings)
        queries = self._queries(request.queries, engine)
        answer = await engine.trajectories(queries, example_ids, resolve, steps)
        response = await _encoded(lambda: encoding.trajectories_response(answer, engine.index))
        return self._fitting(response, "example_ids")

    async def _score_examples(self, request: pb.ScoreExamplesRequest, context: Any) -> None:
        # As long as they are not taken, the scores of all examples stay in memory.
        with self._streams.place():
            responses = await self._scores(request, _deadline(context))
            while True:
                with enough_memory("making a stretch of scores", self._settings):
                    response = await _encoded(lambda: next(responses, None))
                if response is None:
                    return
                async with taken_in(self._settings.stall_s):
                    await context.write(response)

    async def _scores(
        self, request: pb.ScoreExamplesRequest, deadline: float | None
    ) -> Iterator[pb.ScoreExamplesResponse]:
        engine = self._engine(request.index)
        resolve = decoding.resolve_from(request.resolve)
        steps = decoding.steps_from(request.steps)
        fractions, least = decoding.fractions_from(request), decoding.least_magnitude_from(request)
        queries = self._queries(request.queries, engine)
        resolved, scores = await engine.scores(
            queries,
            resolve=resolve,
            steps=steps,
            where=request.where or None,
            deadline=deadline,
            require_full_coverage=request.require_full_coverage,
        )
        return encoding.scores_responses(resolved, stretches(scores, fractions, least), scores.coverage, engine.index)

    async def _find_neighbors(
        self, request: pb.FindNeighborsRequest, deadline: float | None
    ) -> pb.FindNeighborsResponse:
        engine, settings = self._engine(request.index), self._settings
        example_ids = decoding.compared_ids_from(request.example_ids, settings)
        note(num_queries=len(example_ids))
        found = await engine.neighbors(
            example_ids,
            k=decoding.k_from(request, settings),
            by=decoding.similarity_from(request.similarity),
            step=request.step if request.HasField("step") else None,
            threshold=decoding.threshold_from(request),
            where=request.where or None,
            deadline=deadline,
            require_full_coverage=request.require_full_coverage,
        )
        return self._fitting(await _encoded(lambda: encoding.neighbors_response(found, engine.index)), "k")

    async def _sketch_queries(self, request: pb.SketchQueriesRequest) -> pb.SketchQueriesResponse:
        engine = self._engine(request.index)
        queries = self._queries(request.queries, engine)
        resolved = await engine.sketches(queries)
        return self._fitting(await _encoded(lambda: encoding.sketches_response(resolved, engine.index)), "queries")

    async def _sketch_gradients(self, requests: AsyncIterator[pb.SketchGradientsRequest]) -> pb.SketchGradientsResponse:
        def engine_of(name: str) -> Engine:
            with in_field("header"):
                return self._engine(name)

        with self._streams.place(), enough_memory("sketching gradients", self._settings):
            timed = unstalled(aiter(requests), self._settings.stall_s)
            note(num_queries=1)
            engine, values = await gradients.sketched(timed, engine_of, self._settings)
        sketch = pb.Sketch(fingerprint=engine.index.fingerprint, values=to_tensor(values))
        return pb.SketchGradientsResponse(sketch=sketch, index=engine.name)

    async def _described(self, engine: Engine) -> pb.Index:
        refused = self._engines.refused(engine.name)
        aliases = self._engines.aliases_of(engine.name)
        return await _encoded(lambda: encoding.index_message(engine, refused, aliases))

    def _engine(self, asked: str) -> Engine:
        """The engine of an index that the caller may use, asked for by its name or an alias."""
        name, engines = self._engines.index_name(asked), allowed(self._engines)
        if not name and len(engines) == 1:
            (name,) = engines
        check_allowed(name, asked)
        if not name:
            raise InvalidFieldError(f"index is empty, and this server has several: {_listed(engines)}", field="index")
        if name not in engines:
            raise UnknownNameError(f"this server has no index {name!r}, only {_listed(engines)}", field="index")
        note(index=name)
        return engines[name]

    def _queries(self, given: Sequence[pb.Query], engine: Engine) -> list[Query]:
        note(num_queries=len(given))
        return decoding.queries_from(given, engine.index, self._settings)

    def _check_count(self, answers: Sequence[Influences]) -> None:
        count, most = sum(answer.num_influencers for answer in answers), self._settings.max_influencers
        if count > most:
            raise InvalidFieldError(
                f"the answer has {count} influencers, expected at most {most}: lower k, name fewer steps, or send "
                "fewer queries in one request",
                field="k",
            )

    def _fitting(self, response: _Response, field: str) -> _Response:
        size, limit = response.ByteSize(), self._settings.max_message_bytes
        if size > limit:
            raise InvalidFieldError(
                f"the answer is {size} bytes, expected at most {limit}: ask for less in one request", field=field
            )
        return response


async def _answered(context: Any, answer: Callable[[], Awaitable[_Answer]]) -> _Answer:
    """What `answer` gives; its failure becomes the request's status."""
    try:
        return await answer()
    except RequestError as error:
        await refuse(context, error)
    except Exception:
        _log.exception("a request failed")
        await refuse_as_internal(context)


async def _encoded(make: Callable[[], _Answer]) -> _Answer:
    """What `make` makes of an answer, in a thread."""
    with part("encode"):
        return await asyncio.to_thread(make)


def _deadline(context: Any) -> float | None:
    """When to stop waiting for shards, by `time.monotonic()`."""
    left = context.time_remaining()
    return None if left is None else time.monotonic() + SHARDS_SHARE * left


def _listed(engines: Mapping[str, Engine]) -> str:
    return ", ".join(sorted(engines))
