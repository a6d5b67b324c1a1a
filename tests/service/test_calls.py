"""How the clients call: a deadline on every call, and another try only where no server took the first one up."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from loopsway.client import (
    AsyncClient,
    Client,
    DenseGradient,
    IdQuery,
    LoopswayError,
    QueryGradients,
    ServerError,
    UnavailableError,
)
from loopsway.client.channel import SERVICE, channel_options
from loopsway.v1 import attribution_pb2 as pb

METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["Attribution"].methods}
GRADIENTS = QueryGradients(
    num_steps=1, pieces=(DenseGradient(checkpoint="a", parameter="w", step=0, values=np.ones(3)),)
)
CALLS: dict[str, Callable[[Any], Any]] = {
    "GetIndex": lambda client: client.get_index(),
    "ListIndices": lambda client: client.list_indices(),
    "FindInfluences": lambda client: client.find_influences([IdQuery("a")]),
    "StreamInfluences": lambda client: list(client.stream_influences([IdQuery("a")])),
    "GetTrajectories": lambda client: client.get_trajectories([IdQuery("a")], ["a"]),
    "ScoreExamples": lambda client: list(client.score_examples([IdQuery("a")])),
    "FindNeighbors": lambda client: client.find_neighbors(["a"]),
    "SketchQueries": lambda client: client.sketch_queries([IdQuery("a")]),
    "SketchGradients": lambda client: client.sketch_gradients(GRADIENTS),
    "ReloadIndex": lambda client: client.reload_index(),
}


class Refusing(grpc.GenericRpcHandler):
    """Refuses every call of any method, and remembers its name and how long it may take."""

    def __init__(self, code: grpc.StatusCode) -> None:
        self.code = code
        self.calls: list[tuple[str, float | None]] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        name = handler_call_details.method.rpartition("/")[2]

        def refuse(_requests: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
            self.calls.append((name, context.time_remaining()))
            context.abort(self.code, "refused")
            yield b""

        return grpc.stream_stream_rpc_method_handler(refuse)


@contextmanager
def refusing(code: grpc.StatusCode) -> Iterator[tuple[str, Refusing]]:
    handler = Refusing(code)
    server = grpc.server(ThreadPoolExecutor(2), handlers=[handler], options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", handler
    finally:
        server.stop(None).wait(30)


def test_every_method_is_called_by_the_client() -> None:
    assert set(CALLS) == set(METHODS)


@pytest.mark.parametrize(("name", "code"), [*((name, "UNAVAILABLE") for name in CALLS), ("GetIndex", "CANCELLED")])
def test_a_call_that_no_server_took_up_is_tried_four_times(name: str, code: str) -> None:
    with refusing(grpc.StatusCode[code]) as (target, handler), Client(target, timeout_s=20) as client:
        with pytest.raises(UnavailableError):
            CALLS[name](client)
        assert [called for called, _ in handler.calls] == [name] * 4


@pytest.mark.parametrize("code", ["RESOURCE_EXHAUSTED", "INTERNAL", "DEADLINE_EXCEEDED", "ABORTED", "UNKNOWN"])
def test_a_call_that_a_server_took_up_is_not_tried_again(code: str) -> None:
    with refusing(grpc.StatusCode[code]) as (target, handler), Client(target, timeout_s=20) as client:
        for call in CALLS.values():
            with pytest.raises(LoopswayError):
                call(client)
        assert [called for called, _ in handler.calls] == list(CALLS)


def test_every_call_has_the_clients_deadline_but_a_stream_which_has_one_for_each_batch() -> None:
    with refusing(grpc.StatusCode.INTERNAL) as (target, handler), Client(target) as client:
        for call in CALLS.values():
            with pytest.raises(ServerError):
                call(client)
        for name, remaining_s in handler.calls:
            if name == "StreamInfluences":
                assert remaining_s is None or remaining_s > 1e6
            else:
                assert remaining_s is not None
                assert 20 < remaining_s < 32, name  # a deadline travels rounded up


async def test_the_asyncio_client_tries_again_and_has_deadlines_too() -> None:
    with refusing(grpc.StatusCode.UNAVAILABLE) as (target, handler):
        async with AsyncClient(target, timeout_s=20) as client:
            with pytest.raises(UnavailableError):
                await client.find_influences([IdQuery("a")])
            with pytest.raises(UnavailableError):
                await client.sketch_gradients(GRADIENTS)
        assert [called for called, _ in handler.calls] == ["FindInfluences"] * 4 + ["SketchGradients"] * 4
        assert all(remaining_s is not None and 10 < remaining_s < 22 for _, remaining_s in handler.calls)


def test_grpc_tries_again_only_what_reached_no_server_or_a_stopping_one() -> None:
    options = dict(channel_options("127.0.0.1:1", 1 << 20))
    (config,) = json.loads(str(options["grpc.service_config"]))["methodConfig"]
    assert config["name"] == [{"service": SERVICE}]
    assert pb.DESCRIPTOR.services_by_name["Attribution"].full_name == SERVICE
    assert config["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "CANCELLED"]
