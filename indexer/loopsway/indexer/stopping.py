"""Ctrl-C and SIGTERM ask a long job to stop where nothing is lost; a second one stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StoppedError(RuntimeError):
    """The job stopped because it was asked to; what is done is kept.

    Attributes:
        signal: that asked.
    """

    def __init__(self, text: str, signal: signal.Signals) -> None:
        super().__init__(text)
        self.signal = signal


class Stop:
    """Whether a signal has come.

    Attributes:
        signal: that came; None so far.
    """

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self.signal: signal.Signals | None = None
        self._on_signal = on_signal

    def raise_if_asked(self, text: str) -> None:
        """Raises StoppedError with this text if a signal has come."""
        if self.signal is not None:
            raise StoppedError(text, self.signal)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        self._on_signal()


@contextmanager
def stop_on_signals(on_signal: Callable[[], None]) -> Iterator[Stop]:
    """Takes SIGINT and SIGTERM over meanwhile; in a thread other than the main one, where Python allows none, not.

    Args:
        on_signal: called once, at the first.
    """
    stop, kept = Stop(on_signal), dict[signal.Signals, Any]()
    if threading.current_thread() is threading.main_thread():
        # What is ignored stays ignored: a job in a shell's background, or under nohup.
        kept = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) != signal.SIG_IGN}
        for number in kept:
            signal.signal(number, stop._handle)
    try:
        yield stop
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
