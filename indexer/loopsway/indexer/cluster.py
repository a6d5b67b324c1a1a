"""A Ray cluster to work on: one that runs already, or one of this machine alone, for as long as it is needed."""

from __future__ import annotations

import os

try:
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError
except ImportError as error:
    raise ImportError("engine=\"ray\" needs Ray: pip install 'loopsway[ray]'") from error

__all__ = ["RayActorError", "RayError", "RayTaskError", "connect", "ray"]


def connect(address: str | None) -> bool:
    """Connects this process to a cluster, unless it is connected.

    Args:
        address: of the cluster; None: that of RAY_ADDRESS, or one that is started here.

    Returns:
        Whether it was connected just now: then whoever called ends it, with `ray.shutdown`.
    """
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "error"}
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None:
        ray.init(include_dashboard=False, **quiet)
    else:
        ray.init(address=address, **quiet)
    return True
