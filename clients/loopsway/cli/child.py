"""A server in a child process, started and ended for one command."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click

START_S, STOP_S = 120.0, 20.0
POLL_S = 0.05
LOG_LINES = 5


@contextmanager
def running_server(indices: Sequence[str], folder: Path, options: Sequence[str] = ()) -> Generator[int]:
    """Serves the indices on a free port of this machine, which it yields once the server answers.

    Args:
        indices: paths.
        folder: takes the server's log, `serve.log`.
        options: more of the command's.
    """
    ready, log = folder / "serve.ready", folder / "serve.log"
    ready.unlink(missing_ok=True)
    named = [part for path in indices for part in ("--index", path)]
    command = [
        sys.executable,
        "-m",
        "loopsway.cli",
        "serve",
        *named,
        *options,
        "--port",
        "0",
        "--ready-file",
        str(ready),
    ]
    # Killed by SIGTERM, this process would leave the server behind: as an exit, it passes through `finally`.
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as child:
            try:
                yield _port(child, ready, log)
            finally:
                _end(child)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _port(child: subprocess.Popen[bytes], ready: Path, log: Path) -> int:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        if ready.exists():
            return int(json.loads(ready.read_text(encoding="utf-8"))["port"])
        if child.poll() is not None:
            said = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])
            raise click.ClickException(f"the server ended with exit code {child.returncode}: {said}")
        time.sleep(POLL_S)
    raise click.ClickException(f"the server was not ready after {START_S:g} s; its log is {log}")


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(STOP_S)
    except subprocess.TimeoutExpired:
        child.kill()
