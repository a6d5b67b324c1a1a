"""What a client sends again by itself: calls that reached no server, or one that stops."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from loopsway.client import Client, ServerError
from loopsway.client.channel import SERVICE
from loopsway.v1 import attribution_pb2 as pb


@pytest.mark.parametrize(
    ("code", "is_sent_again"),
    [(grpc.StatusCode.UNAVAILABLE, True), (grpc.StatusCode.CANCELLED, True), (grpc.StatusCode.INTERNAL, False)],
)
def test_a_call_is_sent_again_when_no_server_took_it(code: grpc.StatusCode, is_sent_again: bool) -> None:
    codes = [code]

    def get_index(_: Any, context: grpc.ServicerContext) -> pb.GetIndexResponse:
        if codes:
            context.abort(codes.pop(), "once")
        return pb.GetIndexResponse(index=pb.Index(name="second"))

    handler = grpc.unary_unary_rpc_method_handler(
        get_index, pb.GetIndexRequest.FromString, pb.GetIndexResponse.SerializeToString
    )
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"GetIndex": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with Client(f"127.0.0.1:{port}") as client:
            if is_sent_again:
                assert client.get_index().name == "second"
            else:
                with pytest.raises(ServerError, match="once"):
                    client.get_index()
    finally:
        server.stop(None).wait()
