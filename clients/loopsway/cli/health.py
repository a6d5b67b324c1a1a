"""`loopsway health`: whether a server answers yet, for scripts and probes."""

from __future__ import annotations

import sys
from typing import Any

import click

from .connection import Connection, connection_options
from .failure import needs


@click.command(short_help="Ask whether a server is SERVING.")
@connection_options
@click.option("--index", default="", help="Ask for one index.  [default: all]")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True)
def health(connection: Connection, index: str, timeout_s: float) -> None:
    """Prints the status by gRPC's health protocol; the exit code is 0 for SERVING, and 1 for all else.

    Servers tell it without a token.
    """
    with needs("asking for health needs the service", "service,cpu"):
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc
    with connection.channel() as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=index), timeout=timeout_s)
        except grpc.RpcError as error:
            call: Any = error
            if call.code() is grpc.StatusCode.NOT_FOUND:
                raise click.ClickException(f"{connection.server} has no index {index!r}") from error
            raise click.ClickException(f"{connection.server} does not answer: {call.code().name}") from error
    status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    click.echo(status)
    if status != "SERVING":
        sys.exit(1)
