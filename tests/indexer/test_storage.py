"""A full disk and a read-only one fail clearly, and what was published or stored is intact."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from loopsway.indexer import verify_index

from .conftest import build

TESTS = Path(__file__).parents[1]

# Runs in a mount namespace of its own, where a small file system lies over the folder.
PROGRAM = """
import subprocess, sys
from pathlib import Path
from cutting import BATCH_SIZE, BLOCK_ROWS, CONFIG, COUNT
from looped import LoopedTask
from loopsway.indexer import StorageError, build_index, open_index, verify_index

folder, how = Path(sys.argv[1]), sys.argv[2]
path, published = folder / "new.index", folder / "published.index"

def build(path):
    return build_index(
        LoopedTask(count=COUNT), path, CONFIG, block_rows=BLOCK_ROWS, batch_size=BATCH_SIZE, progress=False
    )

def mount(*options):
    subprocess.run(["mount", *options], check=True)

mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder))
build(published)
if how == "full":
    mount("-o", "remount,size=" + sys.argv[3], str(folder))
else:
    mount("-o", "remount,ro", str(folder))
try:
    build(path)
except StorageError as error:
    print(error.strerror)
else:
    print("no error")
assert verify_index(published, progress=False) == []
assert open_index(published).num_examples == COUNT
mount("-o", "remount,rw,size=8m", str(folder))
build(path)
assert verify_index(path, progress=False) == []
arrays = lambda index: {
    file.relative_to(index): file.read_bytes() for file in index.rglob("arrays.zarr/**/*") if file.is_file()
}
assert arrays(path) == arrays(published)
assert not list(path.rglob("*.partial"))
"""


def in_own_mounts(command: list[str]) -> list[str]:
    return ["unshare", "--user", "--map-root-user", "--mount", *command]


@pytest.fixture(scope="module")
def _can_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        tried = subprocess.run(
            in_own_mounts(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path_factory.mktemp("mount"))]), capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("this system has no `unshare`, which makes a small disk for a test")
    if tried.returncode:
        pytest.skip(f"this system lets no test mount a small disk: {tried.stderr.decode().strip()}")


def run_on_a_small_disk(folder: Path, *arguments: str) -> str:
    command = in_own_mounts([sys.executable, "-c", PROGRAM, str(folder), *arguments])
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.usefixtures("_can_mount")
@pytest.mark.parametrize("spare_kib", [8, 60, 120, 200])
def test_a_full_disk_says_so_and_leaves_what_is_there(tmp_path: Path, spare_kib: int) -> None:
    """Full at once, inside a block, and while indexing."""
    build(tmp_path / "measured.index")
    pages = sum(-(-f.lstat().st_size // 4096) for f in (tmp_path / "measured.index").rglob("*") if f.is_file())
    said = run_on_a_small_disk(tmp_path, "full", f"{4 * pages + spare_kib}k")
    assert said.startswith(f"the disk is full: {tmp_path / 'new.index'} could not be written to")
    assert said.endswith("finished blocks are kept: mend it, and run the same command to go on")


@pytest.mark.usefixtures("_can_mount")
def test_a_read_only_disk_says_so_and_leaves_what_is_there(tmp_path: Path) -> None:
    said = run_on_a_small_disk(tmp_path, "read-only")
    assert said.startswith(f"the file system is read-only: {tmp_path / 'new.index'} could not be written to")


def test_verifying_needs_no_writing(copied: Path) -> None:
    for file in [copied, *copied.rglob("*")]:
        file.chmod(0o555 if file.is_dir() else 0o444)
    assert verify_index(copied, progress=False) == []
