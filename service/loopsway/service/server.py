"""The process around the service: listening, health, reflection, and an orderly end.

A server is SERVING, by gRPC's health protocol, once every index has answered a first query of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from loopsway.indexer.store.files import write_json
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import add_AttributionServicer_to_server

from .authentication import Authentication
from .catalog import Catalog
from .checks import check_exposure, check_tracing
from .credentials import server_credentials
from .faults import SettingsError
from .freed_memory import give_back_freed_memory
from .logs import configure_logs
from .metrics import Metrics
from .observation import Observation
from .reception import Reception
from .servicer import Servicer
from .settings import Settings
from .tokens import Tokens

if TYPE_CHECKING:
    from .tracing import Tracing

BURST = 2_000  # requests that may come before the first of them is read: some seconds of refusals
REREAD = frozenset({"aliases", "tokens"})  # settings for which SIGHUP suffices
SERVICE = pb.DESCRIPTOR.services_by_name["Attribution"].full_name

_log = logging.getLogger(__name__)


class Server:
    """A bound server; `start` makes it answer, `stop` ends it. Made by `create_server`.

    Attributes:
        catalog: the indices.
        metrics: of its requests.
        metrics_port: where they are. None: nowhere.
    """

    def __init__(self, settings: Settings, tracer_provider: Any = None) -> None:
        self.catalog, self._settings = Catalog(settings), settings
        self._tokens = Tokens(settings.tokens) if settings.tokens else None
        self.metrics = Metrics(self.catalog)
        self.metrics_port: int | None = None
        self._tracing = _tracing(settings, tracer_provider)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]  # not in its stubs
        self._grpc = grpc.aio.server(
            interceptors=[
                Observation(self.metrics, self._tracing),
                *([] if self._tokens is None else [Authentication(self._tokens)]),
                Reception(settings),
            ],
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", settings.max_message_bytes),
                # Two servers that share a port would each answer some of the requests.
                ("grpc.so_reuseport", 0),
                # gRPC sets no end to what runs on such a connection, so that no stream is cut.
                ("grpc.max_connection_age_ms", round(settings.max_connection_age_s * 1000)),
                # Of more that came at once gRPC itself cancels some, before anybody could say when to come back.
                ("grpc.server.max_pending_requests", BURST),
                ("grpc.server.max_pending_requests_hard_limit", 2 * BURST),
                # Each takes a window of memory until it is read, however large it is. One that grows with the
                # connection's speed would take all of it in: gigabytes, for sketches.
                ("grpc.http2.bdp_probe", 0),
                ("grpc.http2.lookahead_bytes", settings.receive_window_bytes),
            ],
        )
        self._servicer = Servicer(self.catalog, settings)
        add_AttributionServicer_to_server(self._servicer, self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._grpc)

    @property
    def health_names(self) -> tuple[str, ...]:
        """What health can be asked for: "" and the service for all, or one index by its name."""
        return ("", SERVICE, *self.catalog)

    def bind(self) -> int:
        port = self._bind()
        if self._settings.metrics_port is not None:
            self.metrics_port = self.metrics.listen(self._settings.metrics_host, self._settings.metrics_port)
        return port

    def _bind(self) -> int:
        host, port = self._settings.host, self._settings.port
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if self._settings.tls is None:
                return self._grpc.add_insecure_port(address)
            return self._grpc.add_secure_port(address, server_credentials(self._settings.tls))
        except RuntimeError as error:
            raise OSError(f"can't listen on {address}: the port is taken, or the address isn't this machine's; "
                          "port 0 picks a free one") from error  # fmt: skip

    async def start(self) -> None:
        """Listens, warms every index up, then reports SERVING."""
        await self._report(self.health_names, serving=False)
        await self._grpc.start()
        await self.catalog.start(lambda name: self._report([name], serving=True))
        await self._report(["", SERVICE], serving=True)

    def take(self, settings: Settings) -> None:
        """Takes the aliases and the tokens of these settings, both or neither, in place of those before.

        Whether callers need a token was settled when the server was made: where they do and none is left, all are
        refused.

        Raises:
            SettingsError: an alias is none, or there are tokens and the server lets in whoever has none.
        """
        if settings.tokens and self._tokens is None:
            raise SettingsError(
                "there are tokens, and this server was started without any: it asks nobody for one until it is started "
                "again"
            )
        self.catalog.alias(settings.aliases, settings.tokens)
        if self._tokens is None:
            return
        self._tokens.replace(settings.tokens)
        if settings.tokens:
            _log.info("the tokens are %s", ", ".join(token.name for token in settings.tokens))
        else:
            _log.warning("no token is left, and all callers are refused; to serve without any, start the server again")

    async def stop(self) -> None:
        """Refuses new requests, gives running ones `grace_s` to finish, then closes the indices."""
        await self._health.enter_graceful_shutdown()
        self._servicer.end_streams()
        await self._grpc.stop(self._settings.grace_s)
        await self.catalog.stop()
        await asyncio.to_thread(self.metrics.close)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.stop)

    async def _report(self, names: Sequence[str], *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in names:
            await self._health.set(name, status)


def create_server(settings: Settings, *, tracer_provider: Any = None) -> tuple[Server, int]:
    """A server, bound but not yet answering, and its port. Call it within the event loop that will run it.

    Args:
        settings: the indices, the limits and the address.
        tracer_provider: OpenTelemetry's, for spans. None: as `settings.tracing` says.

    Raises:
        LoadError: a task may not run unasked.
        FileNotFoundError: no index at a path.
        ValueError: an index is damaged, two indices share a name, or the host would expose the server.
        OSError: the port can't be had.
    """
    check_exposure(settings)
    check_tracing(settings)
    server = Server(settings, tracer_provider)
    return server, server.bind()


def serve(settings: Settings, *, ready_file: Path | None = None, reread: Callable[[], Settings] | None = None) -> None:
    """Serves the indices until SIGTERM or SIGINT, then drains. Blocks; call it in the main thread.

    SIGHUP looks for new generations at once, and reads aliases and tokens again.

    Args:
        settings: the indices, the limits and the address.
        ready_file: is written, whole, once the server is SERVING: JSON with "port" and "pid"; removed at the end.
            A file that is there already is removed first.
        reread: gives the settings as they are now, for their aliases and tokens; None: those given stay.

    Raises:
        LoadError: a task can't be loaded, or its model makes other sketches than its index holds.
        FileNotFoundError, ValueError, OSError: as `create_server`.
    """
    # Nothing changes where the caller has set logging up.
    configure_logs(settings.log_format, settings.log_level)
    give_back_freed_memory()
    asyncio.run(_serve(settings, ready_file, None if reread is None else partial(_reread, settings, reread)))


async def _serve(settings: Settings, ready_file: Path | None, reread: Callable[[], Settings] | None) -> None:
    server, port = create_server(settings)
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    loop.add_signal_handler(signal.SIGHUP, _look_again, server, reread)
    if ready_file is not None:
        ready_file.unlink(missing_ok=True)
    try:
        await _start_unless(server, stopping)
        if not stopping.is_set():
            names = ", ".join(server.catalog)
            print(f"serving {names} on {settings.host}:{port}", flush=True)
            if ready_file is not None:
                write_json(ready_file, {"port": port, "pid": os.getpid()})
        await stopping.wait()
        _log.info("stopping: running requests have %g s to finish", settings.grace_s)
    finally:
        if ready_file is not None:
            ready_file.unlink(missing_ok=True)
        await server.stop()


def _tracing(settings: Settings, provider: Any) -> Tracing | None:
    if provider is None and not settings.tracing:
        return None
    from .tracing import Tracing  # here: it is an extra's

    return Tracing(provider)


def _look_again(server: Server, reread: Callable[[], Settings] | None) -> None:
    server.catalog.look()
    if reread is None:
        return
    try:
        server.take(reread())
    except (ValueError, OSError) as error:
        _log.error("the aliases and tokens stay as they are: %s", error)


def _reread(served: Settings, reread: Callable[[], Settings]) -> Settings:
    """The settings as they are now; a warning names those that differ and count at a server's start alone."""
    settings = reread()
    changed = [name for name in Settings.model_fields
               if name not in REREAD and getattr(settings, name) != getattr(served, name)]  # fmt: skip
    if changed:
        _log.warning("changed in the settings, and of no effect on a running server: %s; start another server with "
                     "them, and end this one once that is SERVING", ", ".join(changed))  # fmt: skip
    return settings


async def _start_unless(server: Server, stopping: asyncio.Event) -> None:
    """Starts the server; gives up its warm-up when it is told to stop meanwhile."""
    starting, stop = asyncio.ensure_future(server.start()), asyncio.ensure_future(stopping.wait())
    await asyncio.wait([starting, stop], return_when=asyncio.FIRST_COMPLETED)
    stop.cancel()
    if starting.done():
        starting.result()
    else:
        starting.cancel()
