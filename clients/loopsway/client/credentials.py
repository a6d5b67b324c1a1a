"""How a client shows who it is, and makes sure of the server: TLS and a token, as gRPC credentials."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import grpc

from loopsway.wire.hosts import is_loopback_host


@dataclass(frozen=True, kw_only=True)
class Tls:
    """An encrypted connection to a server whose certificate is checked.

    Attributes:
        ca: PEM file with who may have signed the server's certificate. None: whom gRPC's own list trusts.
        cert: PEM file with the client's certificate, for servers that want one; with `key`.
        key: PEM file with its key.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise ValueError(f"cert is {self.cert}, key is {self.key}: they go together, give both or neither")


def channel_credentials(target: str, token: str | None, tls: Tls | None) -> grpc.ChannelCredentials | None:
    """Credentials for a channel to `target`. None: plaintext, and no token.

    Raises:
        ValueError: the token can't be sent, or would go over the network unencrypted. The text never holds it.
        OSError: a file can't be read.
    """
    if tls is not None:
        ca, key, cert = (None if path is None else Path(path).read_bytes() for path in (tls.ca, tls.key, tls.cert))
        channel = grpc.ssl_channel_credentials(ca, key, cert)
    elif token is None:
        return None
    elif is_loopback(target):
        channel = grpc.local_channel_credentials()  # plaintext, to this machine alone
    else:
        raise ValueError(
            f"the token would go to {target} unencrypted, for all on the way to read: give tls=Tls() "
            "(the command's --tls or --ca), or go through a tunnel to 127.0.0.1"
        )
    if token is None:
        return channel
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise ValueError(
            f"the token has {len(token)} characters, among them none or some that no header takes; expected printable "
            "ASCII without spaces: read it with .strip() where it comes from a file"
        )
    return grpc.composite_channel_credentials(channel, grpc.access_token_call_credentials(token))


def is_loopback(target: str) -> bool:
    """Whether the target, as gRPC reads it, can be nothing but this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    addresses = target.removeprefix("ipv4:").removeprefix("ipv6:").split(",")
    hosts = (each.rpartition(":")[0].removeprefix("[").removesuffix("]") for each in addresses)
    return all(is_loopback_host(host) for host in hosts)
