"""How the clients connect: replicas, retries, message sizes and proxies, as gRPC channel options; patience; ids."""

from __future__ import annotations

import json
import random
import re
import secrets
import time

from .credentials import is_loopback
from .errors import REQUEST_ID_KEY, InvalidQueryError, LoopswayError, OverloadedError, UnavailableError

SERVICE = "loopsway.v1.Attribution"
DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 30.0
DEFAULT_MAX_MESSAGE_BYTES = 64 << 20

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")

# Every method but ReloadIndex only reads, and that one may come twice. So a call that reached no server, or a draining
# one, may be sent again; gRPC itself gives CANCELLED to one that comes by a connection which the server took in the
# moment that it stopped. A full queue (RESOURCE_EXHAUSTED) is waited for as long as the server says, and not by gRPC,
# which would come back too soon.
_METHOD_CONFIG = {
    "name": [{"service": SERVICE}],
    "retryPolicy": {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
    },
}
# gRPC's default asks the first address of the target alone, whatever there is beside it.
_LOAD_BALANCING: list[dict[str, dict[str, str]]] = [{"round_robin": {}}]


def channel_options(target: str, max_message_bytes: int, *, retries: bool = True) -> list[tuple[str, str | int]]:
    """The options of a channel that asks all addresses of `target` and takes responses of up to `max_message_bytes`."""
    config = {"loadBalancingConfig": _LOAD_BALANCING, "methodConfig": [_METHOD_CONFIG] if retries else []}
    options: list[tuple[str, str | int]] = [
        ("grpc.service_config", json.dumps(config)),
        ("grpc.enable_retries", int(retries)),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # A request larger than this buffer would not be retried; 256 KiB, gRPC's default, is a few sketches.
        ("grpc.per_rpc_retry_buffer_size", max_message_bytes),
    ]
    if is_loopback(target):
        # gRPC sends even loopback through $http_proxy unless $no_proxy names it.
        options.append(("grpc.enable_http_proxy", 0))
    return options


def request_metadata(request_id: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with a request under this id; None: the server makes one."""
    if request_id is None:
        return ()
    if not _REQUEST_ID.fullmatch(request_id):
        raise InvalidQueryError(
            f"request_id is {request_id!r}, expected 1 to 128 letters, digits and characters of ._:@/+=-",
            field="request_id",
        )
    return ((REQUEST_ID_KEY, request_id),)


def new_request_id() -> str:
    """For a stream: of one that a server made, the client learns at its end, and a batch's error tells it before."""
    return secrets.token_hex(8)


class Patience:
    """How often, and how long, one call, or one batch of a stream, waits for a server that asks to be tried again.

    Args:
        retries: after the first try.
        timeout_s: of the call, with all tries and waits.
        repeatable: whether the request can be sent again. A stream can't: it was read.
    """

    def __init__(self, retries: int, timeout_s: float, *, repeatable: bool) -> None:
        self._retries = retries if repeatable else 0
        self._deadline = time.monotonic() + timeout_s

    def left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def wait_s(self, error: LoopswayError, *, of_batch: bool = False) -> float:
        """Seconds to wait before the next try; raises the error when there is none.

        Args:
            error: of the last try.
            of_batch: it is one of a stream's batch. Of calls, gRPC itself tries again what was unavailable.
        """
        kinds = (OverloadedError, UnavailableError) if of_batch else (OverloadedError,)
        if not isinstance(error, kinds) or error.retry_after_s is None or not self._retries:
            raise error
        wait = error.retry_after_s * random.uniform(1.0, 1.2)  # not all at the same moment
        if wait >= self.left_s():
            raise error
        self._retries -= 1
        return wait
