"""Hosts, by name or address: what both sides of a connection must know of them to be safe."""

from __future__ import annotations

import ipaddress


def is_loopback_host(host: str) -> bool:
    """Whether the name or address can be nothing but this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
