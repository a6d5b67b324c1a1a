"""`Client`: the client that blocks. It and `AsyncClient` differ only in how they wait.

Requests are made in requests.py and results in responses.py, for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, TypeVar, Unpack

import grpc
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
from .streaming import Answer, OnAnswered, Outcome, Outgoing, streamed

_Response = TypeVar("_Response")


class Client:
    """Asks a Loopsway server, and blocks until it answers. Safe to share between threads; close it, or use `with`.

    Calls that reach no server are tried again a few times. Every method raises a `LoopswayError`, which has the
    `request_id` of the call in the server's log.
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
        """Makes the client; it connects with its first call.

        Args:
            target: the server, as host:port. Where the host has several addresses, calls go to each in turn, and past
                those that don't answer.
            token: the caller's, where the server wants one. Goes over TLS, or to this machine.
            tls: None: plaintext.
            timeout_s: the deadline of each call that names none, retries included.
            overload_retries: how often a call is sent again, after the time that an overloaded server asks for, and a
                batch of a stream that it can't answer for now; never other streams, nor beyond the deadline.
            max_message_bytes: the largest request to send and response to accept.

        Raises:
            ValueError: the token would go over the network unencrypted.
            OSError: a file of `tls` can't be read.
        """
        self._target = target
        self._timeout_s = timeout_s
        self._overload_retries = overload_retries
        options, credentials = channel_options(target, max_message_bytes), channel_credentials(target, token, tls)
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options=options)
        self._stub = AttributionStub(self._channel)

    def get_index(self, index: str = "", *, timeout_s: float | None = None, request_id: str | None = None) -> IndexInfo:
        """Describes an index; the name may be left out when the server serves exactly one."""
        request = pb.GetIndexRequest(index=index)
        return responses.index_info(self._call(self._stub.GetIndex, request, timeout_s, request_id).index)

    def find_influences(
        self,
        queries: Sequence[Query],
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[InfluenceOptions],
    ) -> list[InfluenceResult]:
        """The strongest proponents and opponents of each query, in total and at each step.

        Args:
            queries: one or more; asked in one call, they are sketched together.
            timeout_s: None: the client's own.
            request_id: names the call in the server's log; a traced one's, say. None: the server makes one.
            **options: as `InfluenceOptions` has them, such as `k=3`, `where="length < 200"` or `index="maths"`.

        Returns:
            One result for each query.
        """
        request = requests.influences_request(queries, **options)
        return responses.influence_results(self._call(self._stub.FindInfluences, request, timeout_s, request_id))

    def stream_influences(
        self,
        queries: Iterable[Query],
        *,
        batch: int = 16,
        on_progress: OnAnswered | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
        **options: Unpack[InfluenceOptions],
    ) -> Iterator[Answer]:
        """The answers to any number of queries, in their order: what a curator asks of an evaluation set.

        Queries are read as they can be sent, and no faster than answers are taken, so that neither side holds many;
        they are read in another thread. A batch that can't be answered gives its error for each of its queries, and the
        stream goes on.

        Args:
            queries: any number; of a generator, for instance.
            batch: queries that are sketched together; at most as many as the server allows in one request.
            on_progress: called with the number of queries answered so far.
            timeout_s: how long the server may take over one batch; the stream itself has no deadline. None: the
                client's own.
            request_id: as in `find_influences`.
            **options: as `InfluenceOptions` has them.

        Yields:
            For each query its result, or the error that its batch failed with.
        """
        template = requests.influences_request((), **options)
        request_id = new_request_id() if request_id is None else request_id
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return streamed(
            partial(self._stub.StreamInfluences, metadata=request_metadata(request_id)),
            queries,
            Outgoing(template, batch, request_id),
            partial(self._again, timeout_s=timeout_s, request_id=request_id),
            timeout_s=timeout_s,
            on_progress=on_progress,
            target=self._target,
        )

    def get_trajectories(
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
        """The influence of each of the examples on each query, step by step.

        With `resolve="step_matrix"`, for each pair of a step of the example and a step of the query. `steps` has only
        these answered, ascending: of the example for "train_step", else of the query.
        """
        request = requests.trajectories_request(queries, example_ids, resolve, steps, index)
        response = self._call(self._stub.GetTrajectories, request, timeout_s, request_id)
        return responses.trajectories(response, request.example_ids)

    def list_indices(self, *, timeout_s: float | None = None, request_id: str | None = None) -> list[IndexInfo]:
        """Describes every index of the server, by name."""
        response = self._call(self._stub.ListIndices, pb.ListIndicesRequest(), timeout_s, request_id)
        return [responses.index_info(index) for index in response.indices]

    def score_examples(
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
    ) -> Iterator[ScoreChunk]:
        """The influence of every training example on the mean of the queries' losses, in total and at each step.

        Chunks come as they are read; what is not read yet waits on the server.

        Args:
            queries: one or more, of one number of steps.
            resolve: as in `InfluenceOptions`.
            steps: as in `InfluenceOptions`.
            where: a filter over the examples, which are ranked within it. Empty: all.
            top_share: return this share of the examples, those of largest influence, above 0 and at most 1; with
                `bottom_share`, both. None for both: all.
            bottom_share: return this share, those of smallest influence.
            least_magnitude: of the influences that are returned.
            require_full_coverage: as in `InfluenceOptions`.
            index: may be left out when the server serves exactly one.
            timeout_s: of the whole stream. None: the client's own.
            request_id: as in `find_influences`.

        Yields:
            Each ranking in order, the one over the whole loop first.
        """
        request = requests.scores_request(
            queries, resolve, steps, where, top_share, bottom_share, least_magnitude, require_full_coverage, index
        )
        stream = self._stub.ScoreExamples(
            request, timeout=self._timeout_s if timeout_s is None else timeout_s, metadata=request_metadata(request_id)
        )
        try:
            for response in stream:
                yield responses.score_chunk(response)
        except grpc.RpcError as failure:
            raise error_from_rpc(failure, self._target) from failure
        finally:
            stream.cancel()  # whoever stops reading leaves nothing behind on the server

    def find_neighbors(
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
        """The training examples whose gradients are most like those of some, the most alike first; no model runs.

        Args:
            example_ids: of indexed examples.
            k: at most so many for each.
            by: "cosine", or "inner_product", the influence of one on the other.
            step: of the loop. None: the gradients summed over steps.
            threshold: the least similarity. None: any.
            where: a filter over the examples. Empty: all.
            require_full_coverage: as in `InfluenceOptions`.
            index: may be left out when the server serves exactly one.
            timeout_s: None: the client's own.
            request_id: as in `find_influences`.

        Returns:
            One result for each example.
        """
        request = requests.neighbors_request(example_ids, k, by, step, threshold, where, require_full_coverage, index)
        response = self._call(self._stub.FindNeighbors, request, timeout_s, request_id)
        return responses.neighbors(response, request.example_ids)

    def sketch_queries(
        self,
        queries: Sequence[Query],
        *,
        index: str = "",
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> list[SketchQuery]:
        """The queries as sketches, which may be asked about again and again at no model call."""
        request = requests.sketches_request(queries, index)
        return responses.sketch_queries(self._call(self._stub.SketchQueries, request, timeout_s, request_id))

    def sketch_gradients(
        self,
        gradients: QueryGradients,
        *,
        index: str = "",
        on_progress: OnBytes | None = None,
        timeout_s: float | None = None,
        request_id: str | None = None,
    ) -> SketchQuery:
        """A query's gradients as a sketch, which may be asked about again and again; the server runs no model.

        They are sent as fast as the server takes them.

        Args:
            gradients: such as `loopsway.indexer.query_gradients` makes them of a torch model and a batch.
            index: may be left out when the server serves exactly one.
            on_progress: called with the bytes sent so far and of all.
            timeout_s: of the whole stream. None: the client's own.
            request_id: as in `find_influences`.
        """
        parts = gradient_requests(gradients, index, on_progress)
        return responses.sketch_query(self._call(self._stub.SketchGradients, parts, timeout_s, request_id))

    def reload_index(
        self, index: str = "", *, timeout_s: float | None = None, request_id: str | None = None
    ) -> IndexInfo:
        """Has the server look now for a newer generation of an index, and answer from it; needs the scope `admin`.

        One that was refused is tried again. The server goes on with what it began when the deadline passes.

        Args:
            index: may be left out when the server serves exactly one.
            timeout_s: for opening the index and warming it up. None: the client's own.
            request_id: as in `find_influences`.

        Returns:
            What answers from now on; the same as before where no newer generation is published.

        Raises:
            FailedPreconditionError: the newer generation is refused, and why; the one before goes on.
            UnavailableError: it can't be had just now; the one before goes on.
        """
        request = pb.ReloadIndexRequest(index=index)
        return responses.index_info(self._call(self._stub.ReloadIndex, request, timeout_s, request_id).index)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(
        self, method: Callable[..., _Response], request: Any, timeout_s: float | None, request_id: str | None
    ) -> _Response:
        return self._patiently(method, request, self._patience(request, timeout_s), request_id)

    def _again(
        self, request: pb.FindInfluencesRequest, error: LoopswayError, timeout_s: float, request_id: str
    ) -> Outcome:
        """As `streaming.Again`."""
        patience = self._patience(request, timeout_s)
        try:
            time.sleep(patience.wait_s(error, of_batch=True))
            return self._patiently(self._stub.FindInfluences, request, patience, request_id)
        except LoopswayError as last:
            return last

    def _patiently(
        self, method: Callable[..., _Response], request: Any, patience: Patience, request_id: str | None
    ) -> _Response:
        metadata = request_metadata(request_id)
        while True:
            try:
                return method(request, timeout=patience.left_s(), metadata=metadata)
            except grpc.RpcError as failure:
                wait_s = patience.wait_s(error_from_rpc(failure, self._target))
            time.sleep(wait_s)

    def _patience(self, request: Any, timeout_s: float | None) -> Patience:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        return Patience(self._overload_retries, timeout_s, repeatable=isinstance(request, Message))
