"""The entry point: it must say what is missing even where only the base install is there."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Runs the command line; ends the process with its exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    # Read when torch is imported, here and in child processes. OpenMP's threads spin while they wait for one another:
    # with any other work on the cores, that made a small model's build ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from .commands import loopsway
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        print(f"loopsway: the command needs {error.name}: pip install 'loopsway[cli]'", file=sys.stderr)
        sys.exit(2)
    loopsway(prog_name="loopsway")
