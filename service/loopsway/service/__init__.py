"""The gRPC service: indices, each with its task's model, that answer over the network.

`serve` serves the indices that `Settings` name until it is told to stop.
"""

from __future__ import annotations

from loopsway.indexer import LoadError

from .checks import check_settings
from .engine import Engine
from .faults import SettingsError
from .server import Server, create_server, serve
from .settings import IndexSettings, Settings, TlsSettings, TokenSettings
from .sources import read_settings

__all__ = [
    "Engine",
    "IndexSettings",
    "LoadError",
    "Server",
    "Settings",
    "SettingsError",
    "TlsSettings",
    "TokenSettings",
    "check_settings",
    "create_server",
    "read_settings",
    "serve",
]
