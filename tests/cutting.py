"""Builds in processes of their own, to be killed: at a named point, or at any moment.

Children are forked from a server that has imported what they need and run nothing, so that each starts at once.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from looped import LoopedTask
from loopsway.indexer import SketchConfig, build_index
from loopsway.indexer.building import blocks
from loopsway.indexer.search import slot
from loopsway.indexer.store import entries, lock, manifest

COUNT, BLOCK_ROWS, BATCH_SIZE = 50, 16, 8
CONFIG = SketchConfig(width=256, bits=1)
LEASE_S = 0.9  # of the lock on an object store
KILLED = -signal.SIGKILL  # the exit code
POINTS = ("in a block", "after chunks", "after an entry", "while indexing", "before publishing", "after publishing")
CHANGES = frozenset(("open", "os.mkdir", "os.rename", "os.remove", "os.link"))  # of files, as Python audits them
Point = str | int | None  # one of POINTS; or before which change in the index's folder, from 1

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["cutting"])


def computed(log: Path) -> list[int]:
    """The blocks that a build computed, in order."""
    return [int(line) for line in log.read_text().split()] if log.exists() else []


def start_build(path: Path | str, log: Path, point: Point = None, environment: Mapping[str, str] = {}) -> Any:
    """Starts a build; `log` gets the number of each block that is computed."""
    _start_server()
    process = _CONTEXT.Process(target=_build, args=(path, log, point, dict(environment)))
    process.start()
    return process


def _start_server() -> None:
    """The server looks for this module on PYTHONPATH alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def finished_build(path: Path | str, log: Path, point: Point = None, environment: Mapping[str, str] = {}) -> int:
    """The exit code of a build that ends by itself; -9 when it killed itself at its point."""
    process = start_build(path, log, point, environment)
    process.join(timeout=120)
    assert process.exitcode is not None, "the build hangs"
    return process.exitcode


def killed_build(path: Path | str, log: Path, after_s: float, environment: Mapping[str, str] = {}) -> bool:
    """Kills a build after some time; whether it was still running."""
    process = start_build(path, log, environment=environment)
    time.sleep(after_s)
    process.kill()
    process.join()
    return process.exitcode == KILLED


def _build(path: Path | str, log: Path, point: Point, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    lock.LEASE_S = LEASE_S
    _note_blocks(log)
    _kill_at(point, path)
    build_index(LoopedTask(count=COUNT), path, CONFIG, block_rows=BLOCK_ROWS, batch_size=BATCH_SIZE, progress=False)


def _note_blocks(log: Path) -> None:
    coded = blocks.BlockSketcher.coded

    def noted(self: Any, plan: Any, block: int, on_batch: Any) -> Any:
        with log.open("a") as file:
            file.write(f"{block}\n")
        return coded(self, plan, block, on_batch)

    blocks.BlockSketcher.coded = noted


def _kill_at_change(path: Path, number: int) -> None:
    count = 0

    def noted(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in CHANGES and Path(str(args[0])).is_relative_to(path):
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(noted)


def _kill_at(point: Point, path: Path | str) -> None:
    match point:
        case int():
            _kill_at_change(Path(path), point)
        case "in a block":
            _kill(blocks.BlockSketcher, "_coded_batch", call=4)
        case "after chunks":
            _kill(entries, "write_sealed", call=2)
        case "after an entry":
            _kill(entries, "write_sealed", call=2, before=False)
        case "while indexing":
            _kill(slot.Slot, "build", call=3)
        case "before publishing":
            _kill(manifest.Manifest, "write", call=1)
        case "after publishing":
            _kill(manifest.Manifest, "write", call=1, before=False)


def _kill(owner: Any, name: str, *, call: int, before: bool = True) -> None:
    """Kills this process before or after the given call of a function."""
    function, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and before:
            os.kill(os.getpid(), signal.SIGKILL)
        out = function(*args, **kwargs)
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    setattr(owner, name, wrapped)
