"""Which version of Loopsway serves."""

from __future__ import annotations

from functools import cache
from importlib import metadata


@cache
def server_version() -> str:
    """Of the installed distribution."""
    return metadata.version("loopsway")
