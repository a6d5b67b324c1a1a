"""Load on a server: calls one after another, or at random times that don't wait for answers, and how each ended.

Every call is sent once: nothing is tried again behind the measurement's back. Answers are parsed as messages, but not
turned into results.
"""

from __future__ import annotations

import asyncio
import random
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeAlias

import grpc
import grpc.aio

from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub

from .channel import DEFAULT_MAX_MESSAGE_BYTES, DEFAULT_TARGET, DEFAULT_TIMEOUT_S, channel_options
from .credentials import Tls, channel_credentials
from .queries import Query
from .requests import influences_request

Requests: TypeAlias = Mapping[str, Sequence[pb.FindInfluencesRequest]]  # by the name of their kind

OK = grpc.StatusCode.OK.name


@dataclass(kw_only=True)
class Measurement:
    """How the calls after the warm-up ended.

    Attributes:
        durations_s: of each call, by its kind and the name of its status code.
        num_calls: that began, each of which has its duration.
        seconds: from the end of the warm-up to the end of the last call.
        lag_s: the most that a call was sent later than it was meant to be: beyond a few milliseconds, what asks is
            itself too slow.
    """

    durations_s: dict[tuple[str, str], array[float]] = field(default_factory=dict[tuple[str, str], "array[float]"])
    num_calls: int = 0
    seconds: float = 0.0
    lag_s: float = 0.0

    @property
    def num_answered(self) -> int:
        """Calls that were OK."""
        return sum(len(durations) for (_, code), durations in self.durations_s.items() if code == OK)

    @property
    def throughput(self) -> float:
        """Calls a second that were OK."""
        return self.num_answered / self.seconds if self.seconds else 0.0

    def durations_of(self, code: str = OK) -> array[float]:
        """Of all calls with this status."""
        every = array("d")
        for (_, each), durations in self.durations_s.items():
            if each == code:
                every.extend(durations)
        return every

    @property
    def codes(self) -> dict[str, int]:
        """How many calls ended with each status code."""
        counts: dict[str, int] = {}
        for (_, code), durations in self.durations_s.items():
            counts[code] = counts.get(code, 0) + len(durations)
        return counts


class Load:
    """Asks a server for influences, a query a call. Use it within one event loop, and close it.

    Each call draws one of the kinds of queries, and then one of that kind.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        token: str | None = None,
        tls: Tls | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        seed: int = 0,
    ) -> None:
        """Makes the channel; arguments as for `Client`.

        Args:
            target: the server.
            token: the caller's.
            tls: None: plaintext.
            timeout_s: the deadline of each call.
            seed: of what is drawn.
        """
        options = channel_options(target, DEFAULT_MAX_MESSAGE_BYTES, retries=False)
        credentials = channel_credentials(target, token, tls)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=options)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options=options)
        self._stub = AttributionStub(self._channel)
        self._timeout_s = timeout_s
        self._random = random.Random(seed)

    async def closed(
        self, requests: Requests, concurrency: int, *, seconds: float, warm_up_s: float = 0.0
    ) -> Measurement:
        """So many callers, each of which asks again when it is answered: what a server can do.

        Args:
            requests: one or more of each kind.
            concurrency: callers.
            seconds: for which calls begin, after the warm-up.
            warm_up_s: for which calls begin that don't count.
        """
        measured, begin = Measurement(), time.perf_counter() + warm_up_s

        async def ask() -> None:
            while (start := time.perf_counter()) < begin + seconds:
                await self._call(requests, start, measured if start >= begin else Measurement())

        await asyncio.gather(*(ask() for _ in range(concurrency)))
        measured.seconds = time.perf_counter() - begin
        return measured

    async def open(self, requests: Requests, rate: float, *, seconds: float, warm_up_s: float = 0.0) -> Measurement:
        """Calls at random times, as of many callers that know nothing of each other: what callers see.

        A call's duration is from the moment it was meant to begin, however late it was sent: time in which neither
        side gets on counts for all the calls that fall into it.

        Args:
            requests: one or more of each kind.
            rate: calls a second, on average; the times between them are exponential.
            seconds: for which calls begin, after the warm-up.
            warm_up_s: for which calls begin that don't count.
        """
        measured, begin = Measurement(), time.perf_counter() + warm_up_s
        start = begin - warm_up_s
        async with asyncio.TaskGroup() as calls:
            while (start := start + self._random.expovariate(rate)) < begin + seconds:
                if (early := start - time.perf_counter()) > 0:
                    await asyncio.sleep(early)
                counted = measured if start >= begin else Measurement()
                counted.lag_s = max(counted.lag_s, time.perf_counter() - start)
                calls.create_task(self._call(requests, start, counted))
                if early < 0:
                    await asyncio.sleep(0)  # what is behind still takes its answers in
        measured.seconds = time.perf_counter() - begin
        return measured

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, requests: Requests, start: float, measured: Measurement) -> None:
        kind = self._random.choice(list(requests))
        measured.num_calls += 1
        try:
            await self._stub.FindInfluences(self._random.choice(requests[kind]), timeout=self._timeout_s)
            code = OK
        except grpc.aio.AioRpcError as failure:
            code = failure.code().name
        seconds = time.perf_counter() - start
        measured.durations_s.setdefault((kind, code), array("d")).append(seconds)


def load_request(query: Query, *, k: int = 10, index: str = "") -> pb.FindInfluencesRequest:
    """Asks for the influences on one query."""
    return influences_request([query], k=k, index=index)
