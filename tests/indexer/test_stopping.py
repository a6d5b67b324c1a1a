"""Signals stop a build after the block that is being sketched, and say how to go on."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from looped import LoopedTask
from loopsway.indexer import StoppedError
from loopsway.indexer.search.slot import Slot

from .conftest import COUNT, assert_same, build, contents


class Signalled(LoopedTask):
    """Sends this process signals while the second block is sketched."""

    signals: tuple[signal.Signals, ...] = ()
    path: Path

    def losses(self, model: Any, batch: Any) -> Any:
        if self.signals and (self.path / "generations/000001/blocks/000000.json").exists():
            for number in self.signals:
                os.kill(os.getpid(), number)
            self.signals = ()
        return super().losses(model, batch)


def signalled(path: Path, *signals: signal.Signals) -> Signalled:
    task = Signalled(count=COUNT)
    task.path, task.signals = path, signals
    return task


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_build_after_its_block(whole_index: Path, tmp_path: Path, number: signal.Signals) -> None:
    path, handler = tmp_path / "stopped.index", signal.getsignal(number)
    with pytest.raises(
        StoppedError, match=r"32 of 50 examples are stored in .*; run the same command to go on"
    ) as caught:
        build(path, signalled(path, number))
    assert caught.value.signal == number
    assert signal.getsignal(number) == handler
    assert len(list(path.glob("generations/*/blocks/*.json"))) == 2
    build(path, signalled(path))
    assert_same(contents(path), contents(whole_index))


def test_a_second_signal_ends_it_at_once(whole_index: Path, tmp_path: Path) -> None:
    path = tmp_path / "stopped.index"
    with pytest.raises(KeyboardInterrupt):
        build(path, signalled(path, signal.SIGINT, signal.SIGINT))
    assert len(list(path.glob("generations/*/blocks/*.json"))) == 1
    build(path, signalled(path))
    assert_same(contents(path), contents(whole_index))


def test_a_signal_ends_the_indexing_too(whole_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, make = tmp_path / "stopped.index", Slot.build

    def signalling(self: Slot) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return make(self)

    with monkeypatch.context() as patch:
        patch.setattr(Slot, "build", signalling)
        with pytest.raises(StoppedError, match="all examples are stored in"):
            build(path)
    build(path)
    assert_same(contents(path), contents(whole_index))


def test_what_is_ignored_stays_ignored(tmp_path: Path) -> None:
    """As in a shell's background, or under nohup."""
    path, handler = tmp_path / "whole.index", signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert build(path, signalled(path, signal.SIGINT)).num_examples == COUNT
    finally:
        signal.signal(signal.SIGINT, handler)


def test_a_build_in_a_thread_leaves_signals_alone(tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=build, args=(tmp_path / "thread.index",))
    thread.start()
    thread.join(120)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert (tmp_path / "thread.index" / "manifest.json").exists()
