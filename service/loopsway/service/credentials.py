"""The server's certificate for TLS, read again when its files change."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any

import grpc

from .faults import SettingsError
from .settings import TlsSettings

_log = logging.getLogger(__name__)


def server_credentials(tls: TlsSettings) -> grpc.ServerCredentials:
    """Credentials that every new connection gets the newest good certificate of.

    Raises:
        SettingsError: the files hold no certificate and its key.
        OSError: a file can't be read.
    """
    certificate = _Certificate(tls)
    newer: Any = certificate.newer  # None stands for no change, which the stubs don't know
    return grpc.dynamic_ssl_server_credentials(certificate.read(), newer, tls.client_ca is not None)


def check_certificate(tls: TlsSettings) -> None:
    """Raises what a server with this certificate would.

    Raises:
        SettingsError: a file holds no certificate or no key, or the key is another certificate's.
        OSError: a file can't be read.
    """
    for path in _files(tls):
        path.read_bytes()
    try:
        # An encrypted key would ask the terminal for its password.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(tls.certificate, tls.key, password=lambda: "")
    except (ssl.SSLError, ValueError) as error:
        reason = "the key is another certificate's" if "MISMATCH" in str(error) else "they are no PEM of the two"
        raise SettingsError(
            f"certificate {tls.certificate} and key {tls.key} don't fit together: {reason}; expected a certificate and "
            "its own key, unencrypted"
        ) from error
    if tls.client_ca is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(tls.client_ca)
        except ssl.SSLError as error:
            raise SettingsError(f"client_ca {tls.client_ca} holds no certificate; expected PEM") from error


class _Certificate:
    """The files, and what was last seen of them."""

    def __init__(self, tls: TlsSettings) -> None:
        self._tls, self._seen = tls, _marks(tls)

    def read(self) -> grpc.ServerCertificateConfiguration:
        check_certificate(self._tls)
        authority = None if self._tls.client_ca is None else self._tls.client_ca.read_bytes()
        pair = (self._tls.key.read_bytes(), self._tls.certificate.read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=authority)

    def newer(self) -> grpc.ServerCertificateConfiguration | None:
        """The certificate if it has changed, else None. gRPC calls this, from its threads, for each connection."""
        try:
            marks = _marks(self._tls)
            if marks == self._seen:
                return None
            read = self.read()
            if _marks(self._tls) != marks:  # the files are being replaced: the next connection sees them whole
                return None
        except (OSError, ValueError) as error:
            _log.error("the new certificate is not used, the one before stays: %s", error)
            self._seen = _marks_or_none(self._tls)
            return None
        self._seen = marks
        _log.info("certificate %s was read again", self._tls.certificate)
        return read


def _files(tls: TlsSettings) -> list[Path]:
    return [tls.certificate, tls.key, *([tls.client_ca] if tls.client_ca else [])]


def _marks(tls: TlsSettings) -> list[tuple[int, int, int]] | None:
    """What changes when a file does."""
    found = [path.stat() for path in _files(tls)]
    return [(each.st_ino, each.st_size, each.st_mtime_ns) for each in found]


def _marks_or_none(tls: TlsSettings) -> list[tuple[int, int, int]] | None:
    try:
        return _marks(tls)
    except OSError:
        return None
