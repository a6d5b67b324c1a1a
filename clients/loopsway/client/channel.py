"""How the clients connect: retries, message sizes and proxies, as gRPC channel options."""

from __future__ import annotations

import json

SERVICE = "loopsway.v1.Attribution"
DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 30.0
DEFAULT_MAX_MESSAGE_BYTES = 64 << 20

# Every method only reads, so a call that reached no server, or a draining one, may be sent again. A full queue
# (RESOURCE_EXHAUSTED) is the caller's to wait for: retrying here would add to the load.
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": SERVICE}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_LOOPBACK = ("127.", "localhost:", "[::1]:", "unix:", "ipv4:127.", "ipv6:[::1]")


def channel_options(target: str, max_message_bytes: int) -> list[tuple[str, str | int]]:
    """The options of a channel to `target` that accepts responses of up to `max_message_bytes`."""
    options: list[tuple[str, str | int]] = [
        ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
        ("grpc.enable_retries", 1),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A request larger than this buffer would not be retried; 256 KiB, gRPC's default, is a few sketches.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
    ]
    if target.startswith(_LOOPBACK):
        # gRPC sends even loopback through $http_proxy unless $no_proxy names it.
        options.append(("grpc.enable_http_proxy", 0))
    return options
