"""Many queries in one stream: sent batch by batch, no faster than they are answered, and answered in their order.

What is in memory is bounded: WINDOW batches are sent ahead of the answers that were taken, and answers are taken one
batch at a time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeAlias

import grpc
import grpc.aio

from loopsway.v1 import attribution_pb2 as pb

from . import requests, responses
from .errors import DeadlineError, InvalidQueryError, LoopswayError, error_from_failure, error_from_rpc
from .queries import Query
from .results import InfluenceResult

WINDOW = 8
POLL_S = 0.2
END: Any = grpc.aio.EOF  # pyright: ignore  # not in its stubs

OnAnswered: TypeAlias = Callable[[int], object]
Answer: TypeAlias = InfluenceResult | LoopswayError
Outcome: TypeAlias = pb.FindInfluencesResponse | LoopswayError
# Asks for a batch once more, by itself, if its error says when; gives what became of it in the end.
Again: TypeAlias = Callable[[pb.FindInfluencesRequest, LoopswayError], Outcome]
AgainAsync: TypeAlias = Callable[[pb.FindInfluencesRequest, LoopswayError], Awaitable[Outcome]]


class Outgoing:
    """What was sent and is not answered yet.

    Args:
        template: of each batch's request, without queries.
        batch: queries in a batch.
        request_id: of the stream.

    Attributes:
        error: that ended the queries early.
        num_answered: queries.
    """

    def __init__(self, template: pb.FindInfluencesRequest, batch: int, request_id: str) -> None:
        if batch < 1:
            raise InvalidQueryError(f"batch is {batch}, expected at least 1", field="batch")
        self._template, self.batch, self._request_id = template, batch, request_id
        self._waiting: deque[tuple[pb.FindInfluencesRequest, float]] = deque()  # with when they were sent
        self._reading_since: float | None = None
        self.error: BaseException | None = None
        self.num_answered = 0

    def request(self, queries: list[Query]) -> pb.StreamInfluencesRequest:
        request = pb.FindInfluencesRequest()
        request.CopyFrom(self._template)
        request.queries.extend(requests.query_messages(queries))
        self._waiting.append((request, time.monotonic()))
        return pb.StreamInfluencesRequest(request=request)

    def reads(self) -> None:
        """The next answer is waited for from now on."""
        self._reading_since = time.monotonic()

    def waited_s(self) -> float:
        """For how long the oldest batch's answer has been waited for; 0 while the caller is at the one before it."""
        since = self._reading_since
        return time.monotonic() - max(self._waiting[0][1], since) if self._waiting and since is not None else 0.0

    def outcome(self, response: pb.StreamInfluencesResponse) -> tuple[pb.FindInfluencesRequest, Outcome]:
        """The oldest batch, and what became of it."""
        self._reading_since = None
        request, _ = self._waiting.popleft()
        if response.WhichOneof("outcome") == "failure":
            return request, error_from_failure(response.failure, self._request_id)
        return request, response.response

    def answers(self, request: pb.FindInfluencesRequest, outcome: Outcome) -> list[Answer]:
        """One for each query of a batch."""
        count = len(request.queries)
        self.num_answered += count
        return [outcome] * count if isinstance(outcome, LoopswayError) else list(responses.influence_results(outcome))


class _Batches(Iterator[pb.StreamInfluencesRequest]):
    """Requests as they may be sent; iterated by gRPC in a thread of its own."""

    def __init__(self, queries: Iterable[Query], outgoing: Outgoing) -> None:
        self._queries, self._outgoing = iter(queries), outgoing
        self.places = threading.Semaphore(WINDOW)
        self.is_closed = False

    def __next__(self) -> pb.StreamInfluencesRequest:
        while not self.places.acquire(timeout=POLL_S):
            if self.is_closed:
                raise StopIteration
        if self.is_closed:
            raise StopIteration
        try:
            queries = list(islice(self._queries, self._outgoing.batch))
            if queries:
                return self._outgoing.request(queries)
        except Exception as error:  # the caller's own: it is raised where the caller is
            self._outgoing.error = error
        raise StopIteration


def streamed(
    call: Callable[..., Any],
    queries: Iterable[Query],
    outgoing: Outgoing,
    again: Again,
    *,
    timeout_s: float,
    on_progress: OnAnswered | None,
    target: str,
) -> Iterator[Answer]:
    """Each query's answer, in order.

    Args:
        call: the stub's method.
        queries: read as they can be sent, in another thread.
        outgoing: new.
        again: for batches that failed.
        timeout_s: how long the server may take over a batch.
        on_progress: called with the number of queries answered so far.
        target: the server, for messages.
    """
    batches, is_late, is_done = _Batches(queries, outgoing), threading.Event(), threading.Event()
    stream = call(batches)

    def watch() -> None:
        while not is_done.wait(min(POLL_S, timeout_s)):
            if outgoing.waited_s() > timeout_s:
                is_late.set()
                stream.cancel()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        outgoing.reads()
        for response in stream:
            request, outcome = outgoing.outcome(response)
            if isinstance(outcome, LoopswayError):
                outcome = again(request, outcome)
            answers = outgoing.answers(request, outcome)
            if on_progress is not None:
                on_progress(outgoing.num_answered)
            yield from answers
            batches.places.release()
            outgoing.reads()
    except grpc.RpcError as failure:
        raise _ending(failure, outgoing, target, timeout_s if is_late.is_set() else None) from failure
    finally:
        batches.is_closed = True
        is_done.set()
        stream.cancel()  # whoever stops reading leaves nothing behind on the server
    if outgoing.error is not None:
        raise outgoing.error


async def streamed_async(
    call: Callable[..., Any],
    queries: Iterable[Query] | AsyncIterable[Query],
    outgoing: Outgoing,
    again: AgainAsync,
    *,
    timeout_s: float,
    on_progress: OnAnswered | None,
    target: str,
) -> AsyncIterator[Answer]:
    """As `streamed`, within an event loop."""
    places = asyncio.Semaphore(WINDOW)
    stream = call(_batches(queries, outgoing, places))
    try:
        while (response := await _read(stream, outgoing, timeout_s)) is not END:
            request, outcome = outgoing.outcome(response)
            if isinstance(outcome, LoopswayError):
                outcome = await again(request, outcome)
            answers = outgoing.answers(request, outcome)
            if on_progress is not None:
                on_progress(outgoing.num_answered)
            for answer in answers:
                yield answer
            places.release()
    except grpc.RpcError as failure:
        raise _ending(failure, outgoing, target, None) from failure
    finally:
        stream.cancel()
    if outgoing.error is not None:
        raise outgoing.error


async def _batches(
    queries: Iterable[Query] | AsyncIterable[Query], outgoing: Outgoing, places: asyncio.Semaphore
) -> AsyncIterator[pb.StreamInfluencesRequest]:
    source = aiter(queries) if isinstance(queries, AsyncIterable) else _asynchronous(queries)
    is_last = False
    while not is_last:
        await places.acquire()
        found: list[Query] = []
        try:
            while len(found) < outgoing.batch and not is_last:
                query = await anext(source, None)
                is_last = query is None
                found += [] if query is None else [query]
            if not found:
                return
            request = outgoing.request(found)
        except Exception as error:  # the caller's own: it is raised where the caller is
            outgoing.error = error
            return
        yield request


async def _asynchronous(queries: Iterable[Query]) -> AsyncIterator[Query]:
    for query in queries:
        yield query


async def _read(stream: Any, outgoing: Outgoing, timeout_s: float) -> Any:
    """The next response, waited for no longer than the server may take over a batch."""
    outgoing.reads()
    reading = asyncio.ensure_future(stream.read())
    try:
        while not reading.done():
            await asyncio.wait([reading], timeout=min(POLL_S, timeout_s))
            if not reading.done() and outgoing.waited_s() > timeout_s:
                raise _too_late(timeout_s)
        return reading.result()
    finally:
        reading.cancel()


def _ending(failure: grpc.RpcError, outgoing: Outgoing, target: str, exceeded_s: float | None) -> BaseException:
    if outgoing.error is not None:
        return outgoing.error
    error = error_from_rpc(failure, target) if exceeded_s is None else _too_late(exceeded_s)
    error.args = (f"{error} (the first {outgoing.num_answered} queries of the stream are answered: go on after them)",)
    return error


def _too_late(timeout_s: float) -> DeadlineError:
    return DeadlineError(f"the server took longer than {timeout_s:g} s over a batch; raise timeout_s or lower batch")
