"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import object_store

# Before torch and FAISS are imported, here and in the subprocesses of tests: the models are tiny, and OpenMP threads
# that spin for one another slow such work down, tenfold on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def store_variables() -> Iterator[dict[str, str]]:
    """The environment of those who use an object store that runs meanwhile."""
    with object_store.running_store() as variables:
        yield variables


@pytest.fixture(scope="session")
def parity_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a parity training with the recipe that ships: real, and so about a minute of work, once."""
    from loopsway.tasks import parity_training  # here: most tests need no torch

    run = tmp_path_factory.mktemp("runs") / "parity"
    parity_training.train(run, progress=False)
    return run


# A warning is an error in the command's own processes too.
COMMAND = [sys.executable, "-W", "error", "-m", "loopsway.cli"]


def run_demo(checkout: Path) -> str:
    """What `loopsway demo` prints in this working directory, where it leaves `runs/demo`."""
    environment = os.environ | {"COLUMNS": "120", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [*COMMAND, "demo"], check=False, capture_output=True, text=True, timeout=280, env=environment, cwd=checkout
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def demonstrated(parity_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A working directory in which the demo has run, on the parity training above, and what it printed."""
    checkout = tmp_path_factory.mktemp("checkout")
    shutil.copytree(parity_run, checkout / "runs" / "demo" / "parity")
    return checkout, run_demo(checkout)
