"""Settings and fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before torch and FAISS are imported, here and in the subprocesses of tests: the models are tiny, and OpenMP threads
# that spin for one another slow such work down, tenfold on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def parity_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a parity training with the recipe that ships: real, and so about a minute of work, once."""
    from loopsway.tasks import parity_training  # here: most tests need no torch

    run = tmp_path_factory.mktemp("runs") / "parity"
    parity_training.train(run, progress=False)
    return run
