"""The gRPC service: indices, each with its task's model, that answer over the network.

`load_engine` opens an index to be served, `serve` serves it until it is told to stop.
"""

from __future__ import annotations

from loopsway.indexer import LoadError

from .engine import Engine
from .loading import load_engine
from .server import Server, create_server, serve
from .settings import Settings

__all__ = ["Engine", "LoadError", "Server", "Settings", "create_server", "load_engine", "serve"]
