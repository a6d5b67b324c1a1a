"""The gRPC service: indices, each with its task's model, that answer over the network.

A `Source` says where an index is, `serve` serves several until it is told to stop.
"""

from __future__ import annotations

from loopsway.indexer import LoadError

from .engine import Engine
from .loading import Source
from .server import Server, create_server, serve
from .settings import Settings

__all__ = ["Engine", "LoadError", "Server", "Settings", "Source", "create_server", "serve"]
