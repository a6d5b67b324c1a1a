"""Several servers of one name: each is asked, one that is gone is not missed, and clients look for new ones in time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from loopsway.client import AsyncClient, Client, ExampleQuery, LoopswayError, Query
from loopsway.service import Settings
from loopsway.v1 import attribution_pb2 as pb
from serving import QUERIES, Served, running, wait_for, without_model

READY = grpc.ChannelConnectivity.READY


def replica(path: Path, name: str) -> Settings:
    """Of a server that tells by its index's name which one it is."""
    asked = without_model(path).model_copy(update={"name": name})
    return Settings(indices=(asked,), port=0, grace_s=0)


async def test_calls_go_to_each_replica_and_past_one_that_is_gone(index_path: Path) -> None:
    seen: set[str] = set()
    with running(replica(index_path, "one")) as (_, first):
        with running(replica(index_path, "two")) as (_, second):
            target = f"ipv4:127.0.0.1:{first},127.0.0.1:{second}"
            client, other = Client(target, timeout_s=20), AsyncClient(target, timeout_s=20)
            wait_for(lambda: seen.add(client.get_index().name) or seen == {"one", "two"})
            assert {(await other.get_index()).name for _ in range(20)} == {"one", "two"}
        with client:
            assert {client.get_index().name for _ in range(20)} == {"one"}
        async with other:
            assert {(await other.get_index()).name for _ in range(20)} == {"one"}


def test_a_connection_ends_at_its_age_and_what_runs_on_it_does_not(serve: Callable[..., Served]) -> None:
    served = serve(max_connection_age_s=1)
    states: list[grpc.ChannelConnectivity] = []
    has_ended, answers = threading.Event(), []

    def queries() -> Iterator[Query]:
        yield ExampleQuery(QUERIES[0])
        assert has_ended.wait(30)
        for query in QUERIES:
            yield ExampleQuery(query)

    with Client(served.target) as client:
        client._channel.subscribe(states.append)  # pyright: ignore[reportPrivateUsage]
        stream = client.stream_influences(queries(), batch=1, k=1)
        answers.append(next(stream))
        wait_for(lambda: READY in states and states[states.index(READY) + 1 :])
        has_ended.set()
        answers += stream
        assert client.get_index().name == "tiny"
    assert len(answers) == 1 + len(QUERIES)
    assert not any(isinstance(answer, LoopswayError) for answer in answers)
    assert served.stub.GetIndex(pb.GetIndexRequest()).index.name == "tiny"
