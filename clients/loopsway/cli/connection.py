"""The options of commands that ask a server: where it is, and how both show who they are."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import grpc

    from loopsway.client import AsyncClient, Client, Tls
    from loopsway.client.load import Load

_Client = TypeVar("_Client")
Command = TypeVar("Command", bound=Callable[..., Any])

TOKEN_VARIABLE = "LOOPSWAY_TOKEN"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_OPTIONS = (
    click.option(
        *("--server", "--target"),
        default="127.0.0.1:50051",
        show_default=True,
        metavar="HOST:PORT",
        help="The server to ask.",
    ),
    click.option(
        "--token-file", type=_FILE, metavar="FILE", help=f"Holds the token to show.  [default: ${TOKEN_VARIABLE}]"
    ),
    click.option("--tls", is_flag=True, help="Encrypt, and check the server's certificate."),
    click.option("--ca", type=_FILE, metavar="FILE", help="--tls, with who may have signed that certificate."),
    click.option("--cert", type=_FILE, metavar="FILE", help="--tls, with a certificate of your own, and --key."),
    click.option("--key", type=_FILE, metavar="FILE", help="Of --cert."),
)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """What these options say."""

    server: str
    token_file: Path | None
    tls: bool
    ca: Path | None
    cert: Path | None
    key: Path | None

    def client(self, timeout_s: float) -> Client:
        """A client of the server; what it can't be made of is a usage error."""
        from loopsway.client import Client

        return self._made(Client, timeout_s)

    def async_client(self, timeout_s: float) -> AsyncClient:
        """As `client`, within an event loop."""
        from loopsway.client import AsyncClient

        return self._made(AsyncClient, timeout_s)

    def load(self, timeout_s: float) -> Load:
        """As `async_client`, to measure with."""
        from loopsway.client.load import Load

        return self._made(Load, timeout_s)

    def channel(self) -> grpc.Channel:
        """A channel to the server that shows no token, for what is asked without one."""
        import grpc

        from loopsway.client.channel import DEFAULT_MAX_MESSAGE_BYTES, channel_options
        from loopsway.client.credentials import channel_credentials

        options = channel_options(self.server, DEFAULT_MAX_MESSAGE_BYTES)
        try:
            credentials = channel_credentials(self.server, None, self._tls())
        except (ValueError, OSError) as error:
            raise click.UsageError(str(error)) from error
        if credentials is None:
            return grpc.insecure_channel(self.server, options=options)
        return grpc.secure_channel(self.server, credentials, options=options)

    def _made(self, kind: Callable[..., _Client], timeout_s: float) -> _Client:
        try:
            return kind(self.server, token=self._token(), tls=self._tls(), timeout_s=timeout_s)
        except (ValueError, OSError) as error:
            raise click.UsageError(str(error)) from error

    def _tls(self) -> Tls | None:
        from loopsway.client import Tls

        wanted = self.tls or any(file is not None for file in (self.ca, self.cert, self.key))
        return Tls(ca=self.ca, cert=self.cert, key=self.key) if wanted else None

    def _token(self) -> str | None:
        if self.token_file is not None:
            return self.token_file.read_text(encoding="utf-8").strip()
        return os.environ.get(TOKEN_VARIABLE) or None


def connection_options(command: Command) -> Command:
    """Adds the options; the command gets them as its parameter `connection`."""

    @functools.wraps(command)
    def with_connection(
        *,
        server: str,
        token_file: Path | None,
        tls: bool,
        ca: Path | None,
        cert: Path | None,
        key: Path | None,
        **rest: Any,
    ) -> Any:
        connection = Connection(server=server, token_file=token_file, tls=tls, ca=ca, cert=cert, key=key)
        return command(connection=connection, **rest)

    decorated: Any = with_connection
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated
