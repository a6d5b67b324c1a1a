"""The command, run in this process or in one of its own, on a small index that it built and serves."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from loopsway.cli.commands import loopsway
from serving import TASK_SPEC

from ..conftest import COMMAND


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)


def invoke(arguments: Sequence[str | Path]) -> Result:
    """The command in this process."""
    return CliRunner(env={"COLUMNS": "120"}).invoke(loopsway, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def tiny_index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.index"
    done = run("build", "--task", TASK_SPEC, "--out", path, "--width", "256", "--bits", "8", "--batch-size", "16")
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def target(tiny_index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `loopsway serve` answers for the small index."""
    with served(tiny_index, tmp_path_factory.mktemp("serve")) as target:
        yield target


@contextmanager
def served(index: Path | str, folder: Path, *more: str) -> Iterator[str]:
    """Runs `loopsway serve` on an index of the small task; gives where it answers."""
    ready, log = folder / "ready", folder / "log"
    options = ["--index", str(index), "--task", TASK_SPEC, "--port", "0", "--ready-file", str(ready), *more]
    with (
        log.open("wb") as output,
        subprocess.Popen([*COMMAND, "serve", *options], stdout=output, stderr=output) as child,
    ):
        try:
            deadline = time.monotonic() + 120
            while not ready.exists():
                assert child.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            yield f"127.0.0.1:{json.loads(ready.read_text())['port']}"
        finally:
            child.terminate()
            code = child.wait(60)
    assert code == 0, log.read_text()
    assert not ready.exists()
