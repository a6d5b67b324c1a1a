"""The explorer: a web page that asks a Loopsway server, served on this machine by an app that is a client itself.

Knows the client, and nothing of indices, models or the service. Needs the extra `explorer`.
"""

from __future__ import annotations

from .app import create_app
from .server import Explorer, serve

__all__ = ["Explorer", "create_app", "serve"]
