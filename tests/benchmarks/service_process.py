"""The looped GPT, served by `loopsway serve` in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TASK = f"{Path(__file__).with_name('served_gpt.py')}:ServedGPT"
PROMISE_S = 1.0  # below what as many requests as are admitted take, so that it is this that binds


@dataclass(frozen=True, kw_only=True)
class Served:
    """`loopsway serve` in a process of its own.

    Attributes:
        log: its lines, as JSON.
    """

    target: str
    pid: int
    log: Path

    @property
    def waits_s(self) -> list[float]:
        """How long each request that was answered had waited for its parts to be begun."""
        lines = (json.loads(line) for line in self.log.read_text().splitlines() if '"FindInfluences OK"' in line)
        return [line["queue_seconds"] for line in lines]

    @property
    def anonymous_mib(self) -> float:
        """Memory of the server and its model process that no file backs."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        family = [self.pid, *map(int, children)]
        lines = [line for each in family for line in Path(f"/proc/{each}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


@contextmanager
def serving(index: Path, arguments: Mapping[str, int], folder: Path) -> Iterator[Served]:
    """Serves the index."""
    ready, log = folder / "ready", folder / "log"
    given = [part for name, value in arguments.items() for part in ("--task-arg", f"{name}={value}")]
    command = [sys.executable, "-m", "loopsway.cli", "serve", "--index", index, "--task", TASK, *given]
    options = ["--port", "0", "--ready-file", ready]
    environment = os.environ | {"LOOPSWAY_MAX_WAIT_S": str(PROMISE_S), "LOOPSWAY_LOG_FORMAT": "json"}
    with (
        log.open("wb") as output,
        subprocess.Popen([*command, *options], stdout=output, stderr=output, env=environment) as child,
    ):
        try:
            while not ready.exists():
                if child.poll() is not None:
                    raise RuntimeError(log.read_text())
                time.sleep(0.05)
            yield Served(target=f"127.0.0.1:{json.loads(ready.read_text())['port']}", pid=child.pid, log=log)
        finally:
            child.terminate()
            child.wait(60)
