"""`AsyncClient`: the client for asyncio. Requests and results are made as for `Client`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc
import grpc.aio
from google.protobuf.message import Message

from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from loopsway.wire import QueryGradients

from . import requests, responses
from .channel import (
    DEFAULT_MAX_MESSAGE_BYTES,
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    Patience,
    channel_options,
    new_request_id,
    request_metadata,
)
from .credentials import Tls, channel_credentials
from .errors import LoopswayError, error_from_rpc
from .gradients import OnBytes, gradient_requests
from .options import By, InfluenceOptions, Resolve, TrajectoryResolve
from .queries import Query, SketchQuery
from .results import ExampleNeighbors, IndexInfo, InfluenceResult, ScoreChunk, Trajectories
from .streaming import Answer, OnAnswered, Outcome, Outgoing, streamed_async

_Response = TypeVar("_Response")


class AsyncClient:
    """Asks a Loopsway server from asyncio: the methods of `Client`, awaited. Use it within one event loop.

    A call that is cancelled is cancelled on the server too, and costs it nothing if it was still waiting there.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        overload_retries: int = 2,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        """Makes the client; arguments as for `Client`."""
        self._target = target
        self._timeout_s = timeout_s
        self._overload_retries = overload_retries
        options, credentials = channel_options(target, max_message_bytes), channel_credentials(target, token, tls)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options=options)
        self._stub = AttributionStub(self._channel)

    async def get_index(
        self, index: str = "", *, timeout_s: float | None = None, request_id: str | None = None
    ) -> IndexInfo:
        """As `Client.get_index`."""
        request = pb.GetIndexRequest(index=index)
        return responses.index_info((await self._call(self._stub.GetIndex, request, timeout_s, request_id)).index)

    async def find_influences(
        self,
        queries: Sequence[Query],
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[InfluenceOptions],
    ) -> list[InfluenceResult]:
        """As `Client.find_influences`."""
        request = requests.influences_request(queries, **options)
        return responses.influence_results(await self._call(self._stub.FindInfluences, request, timeout_s, request_id))

    def stream_influences(
        self,
        queries: Iterable[Query] | AsyncIterable[Query],
        *,
        batch: int = 16,
        on_progress: OnAnswered | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[InfluenceOptions],
    ) -> AsyncIterator[Answer]:
        """As `Client.stream_influences`, for `async for`; queries may be asynchronous too."""
        template = requests.influences_request((), **options)
        request_id = new_request_id() if request_id is None else request_id
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return streamed_async(
            partial(self._stub.StreamInfluences, metadata=request_metadata(request_id)),
            queries,
            Outgoing(template, batch, request_id),
            partial(self._again, timeout_s=timeout_s, request_id=request_id),
            timeout_s=timeout_s,
            on_progress=on_progress,
            target=self._target,
        )

    async def get_trajectories(
        self,
        queries: Sequence[Query],
        example_ids: Sequence[str],
        *,
        resolve: TrajectoryResolve = "query_step",
        steps: Sequence[int] | None = None,
        index: str = "",
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> Trajectories:
        """As `Client.get_trajectories`."""
        request = requests.trajectories_request(queries, example_ids, resolve, steps, index)
        response = await self._call(self._stub.GetTrajectories, request, timeout_s, request_id)
        return responses.trajectories(response, request.example_ids)

    async def list_indices(self, *, timeout_s: float | None = None, request_id: str | None = None) -> list[IndexInfo]:
        """As `Client.list_indices`."""
        response = await self._call(self._stub.ListIndices, pb.ListIndicesRequest(), timeout_s, request_id)
        return [responses.index_info(index) for index in response.indices]

    async def score_examples(
        self,
        queries: Sequence[Query],
        *,
        resolve: Resolve = "query_step",
        steps: Sequence[int] | None = None,
        where: str = "",
        top_share: float | None = None,
        bottom_share: float | None = None,
        least_magnitude: float = 0.0,
        require_full_coverage: bool = False,
        index: str = "",
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> AsyncIterator[ScoreChunk]:
        """As `Client.score_examples`."""
        request = requests.scores_request(
            queries, resolve, steps, where, top_share, bottom_share, least_magnitude, require_full_coverage, index
        )
        stream = self._stub.ScoreExamples(
            request, timeout=self._timeout_s if timeout_s is None else timeout_s, metadata=request_metadata(request_id)
        )
        try:
            async for response in stream:
                yield responses.score_chunk(response)
        except grpc.RpcError as failure:
            raise error_from_rpc(failure, self._target) from failure
        finally:
            stream.cancel()  # whoever stops reading leaves nothing behind on the server

    async def find_neighbors(
        self,
        example_ids: Sequence[str],
        *,
        k: int = 10,
        by: By = "cosine",
        step: int | None = None,
        threshold: float | None = None,
        where: str = "",
        require_full_coverage: bool = False,
        index: str = "",
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> list[ExampleNeighbors]:
        """As `Client.find_neighbors`."""
        request = requests.neighbors_request(example_ids, k, by, step, threshold, where, require_full_coverage, index)
        response = await self._call(self._stub.FindNeighbors, request, timeout_s, request_id)
        return responses.neighbors(response, request.example_ids)

    async def sketch_queries(
        self,
        queries: Sequence[Query],
        *,
        index: str = "",
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> list[SketchQuery]:
        """As `Client.sketch_queries`."""
        request = requests.sketches_request(queries, index)
        return responses.sketch_queries(await self._call(self._stub.SketchQueries, request, timeout_s, request_id))

    async def sketch_gradients(
        self,
        gradients: QueryGradients,
        *,
        index: str = "",
        on_progress: OnBytes | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> SketchQuery:
        """As `Client.sketch_gradients`."""
        parts = gradient_requests(gradients, index, on_progress)
        return responses.sketch_query(await self._call(self._stub.SketchGradients, parts, timeout_s, request_id))

    async def reload_index(
        self, index: str = "", *, timeout_s: float | None = None, request_id: str | None = None
    ) -> IndexInfo:
        """As `Client.reload_index`."""
        request = pb.ReloadIndexRequest(index=index)
        return responses.index_info((await self._call(self._stub.ReloadIndex, request, timeout_s, request_id)).index)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(
        self, method: Callable[..., Awaitable[_Response]], request: Any, timeout_s: float | None, request_id: str | None
    ) -> _Response:
        return await self._patiently(method, request, self._patience(request, timeout_s), request_id)

    async def _again(
        self, request: pb.FindInfluencesRequest, error: LoopswayError, timeout_s: float, request_id: str
    ) -> Outcome:
        """As `streaming.AgainAsync`."""
        patience = self._patience(request, timeout_s)
        try:
            await asyncio.sleep(patience.wait_s(error, of_batch=True))
            return await self._patiently(self._stub.FindInfluences, request, patience, request_id)
        except LoopswayError as last:
            return last

    async def _patiently(
        self, method: Callable[..., Awaitable[_Response]], request: Any, patience: Patience, request_id: str | None
    ) -> _Response:
        metadata = request_metadata(request_id)
        while True:
            try:
                return await method(request, timeout=patience.left_s(), metadata=metadata)
            except grpc.RpcError as failure:
                wait_s = patience.wait_s(error_from_rpc(failure, self._target))
            await asyncio.sleep(wait_s)

    def _patience(self, request: Any, timeout_s: float | None) -> Patience:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return Patience(self._overload_retries, timeout_s, repeatable=isinstance(request, Message))
