"""Streams of requests: how many may be open at once, and how long one may let the server wait.

A stream that is cut, or whose client does nothing, leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import TypeVar

from .errors import QueueFullError, StalledError
from .settings import Settings

_Item = TypeVar("_Item")


class StreamPlaces:
    """The streams that a server has open. Use it within one event loop."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.num_open = 0

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place for one more.

        Raises:
            QueueFullError: there is none.
        """
        if self.num_open >= self._settings.max_streams:
            raise QueueFullError(
                f"the server has {self.num_open} streams open, as many as it admits",
                retry_after_s=self._settings.retry_after_s,
            )
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1


async def unstalled(items: AsyncIterator[_Item], stall_s: float) -> AsyncIterator[_Item]:
    """The same items.

    Raises:
        StalledError: the next one did not come in time.
    """
    while True:
        try:
            async with asyncio.timeout(stall_s):
                item = await anext(items)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise StalledError(f"the stream's next message did not come within {stall_s:g} s") from error
        yield item
