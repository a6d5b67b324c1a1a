"""The committed generated code is what generate.sh makes of the proto, and the proto is lint-free."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PROTOS = Path(__file__).parents[2] / "protos"


def test_the_committed_code_is_what_generate_makes(tmp_path: Path) -> None:
    copy = shutil.copytree(PROTOS, tmp_path / "protos", ignore=shutil.ignore_patterns("*_pb2*", "__pycache__"))
    subprocess.run([copy / "generate.sh"], env=os.environ | {"PYTHON": sys.executable}, check=True)
    made = sorted(path.relative_to(copy) for path in copy.rglob("*_pb2*"))
    assert len(made) == 4
    stale = [str(path) for path in made if (copy / path).read_bytes() != (PROTOS / path).read_bytes()]
    assert not stale, f"run protos/generate.sh and commit its output: {stale}"


def test_the_proto_passes_buf_lint() -> None:
    buf = Path(sysconfig.get_path("scripts")) / "buf"
    done = subprocess.run([buf, "lint", PROTOS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
