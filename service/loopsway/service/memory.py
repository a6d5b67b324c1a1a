"""What becomes of a request for which memory runs out, on the processor or a device, in the server's own process."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from loopsway.indexer.memory import is_out_of_memory

from .errors import UnavailableError
from .settings import Settings

_log = logging.getLogger(__name__)


@contextmanager
def enough_memory(what: str, settings: Settings) -> Iterator[None]:
    """Refuses the request under way if memory runs out in here; the server goes on.

    Args:
        what: is done, for the log.
        settings: the limits.

    Raises:
        UnavailableError: it ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _log.warning("out of memory in %s: %s", what, error)
        raise UnavailableError(
            "the server has too little memory for this request now; ask again later, or for less",
            retry_after_s=settings.retry_after_s,
        ) from error
