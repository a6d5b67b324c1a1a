"""The process around the app: where it listens, and its end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass

import uvicorn

from loopsway.client import AsyncClient
from loopsway.wire.hosts import is_loopback_host

from .app import create_app

GRACE_S = 2


@dataclass(frozen=True, kw_only=True)
class Explorer:
    """An explorer that listens: a browser that comes now waits until `serve` answers.

    Attributes:
        url: where browsers on this machine find it.
    """

    url: str
    listener: socket.socket
    server: uvicorn.Server

    @staticmethod
    def bind(
        connect: Callable[[], AsyncClient], *, host: str = "127.0.0.1", port: int = 0, insecure_bind: bool = False
    ) -> Explorer:
        """Listens on the address; port 0 takes a free one.

        Args:
            connect: makes the client, once, when the app starts.
            host: loopback, or `insecure_bind` must be set: whoever reaches the explorer may ask.
            port: 0 to 65535.
            insecure_bind: whether `host` may be any address.

        Raises:
            ValueError: the host would expose the explorer.
            OSError: the port can't be had.
        """
        if not insecure_bind and not is_loopback_host(host):
            raise ValueError(
                f"host {host} is not loopback, and whoever reaches the explorer could read the training examples: use "
                "127.0.0.1 (and a tunnel), or set insecure_bind if the network is trusted"
            )
        listener = _listener(host, port)
        taken = listener.getsockname()[1]
        app = create_app(connect, hosts=frozenset({host.lower()}))
        # The answers to a browser that stays connected must not hold up the end.
        config = uvicorn.Config(
            app, log_level="warning", ws="none", server_header=False, timeout_graceful_shutdown=GRACE_S
        )
        return Explorer(url=_url(host, taken), listener=listener, server=uvicorn.Server(config))


def serve(explorer: Explorer) -> None:
    """Answers until Ctrl-C or SIGTERM. Blocks; call it in the main thread."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # uvicorn gives a signal, once it has stopped for it, to whoever handled signals before: an end, and no failure.
        signal.signal(number, explorer.server.handle_exit)
    try:
        explorer.server.run(sockets=[explorer.listener])
    finally:
        explorer.listener.close()


def _listener(host: str, port: int) -> socket.socket:
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"can't listen on {address}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise OSError(
            f"can't listen on {address}: the port is taken, or the address isn't this machine's; "
            "port 0 picks a free one"
        ) from error
    return listener


def _url(host: str, port: int) -> str:
    """What to open; an address that stands for all of this machine's is opened by the loopback one."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{shown}]:{port}/" if ":" in shown else f"http://{shown}:{port}/"
