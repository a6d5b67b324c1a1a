"""The tree is what the design says, and what is built from it is whole and light."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = ("indexer", "service", "protos", "clients")
PACKAGES = (
    "indexer/loopsway/indexer",
    "indexer/loopsway/tasks",
    "indexer/loopsway/experiments",
    "service/loopsway/service",
    "protos/loopsway/v1",
    "protos/loopsway/wire",
    "clients/loopsway/client",
    "clients/loopsway/cli",
    "clients/loopsway/explorer",
)
TOP_LEVEL = {
    *SOURCE_ROOTS,
    "tests",
    "pyproject.toml",
    "README.md",
    "CHANGELOG.md",
    "Makefile",
    "constraints.txt",
    "LICENSE",
}
BESIDE_LOOPSWAY = {
    "protos": {"generate.sh", "buf.yaml"},
    "indexer": {"README.md"},
    "service": {"README.md", "deployment"},  # what runs the service is no Python, and stays out of the wheel
    "clients": {"README.md"},
}


def is_source(path: Path) -> bool:
    return path.parts[0] in SOURCE_ROOTS and path.parts[1] == "loopsway"


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """What git holds or would hold, relative to the root."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_only_the_designed_entries_stand_at_the_top(files: list[Path]) -> None:
    unexpected = {path.parts[0] for path in files if not path.parts[0].startswith(".")} - TOP_LEVEL
    assert not unexpected, f"not in the design's tree: {sorted(unexpected)}"


@pytest.mark.parametrize("root", SOURCE_ROOTS)
def test_a_source_root_holds_loopsway_and_nothing_else(root: str, files: list[Path]) -> None:
    entries = {path.parts[1] for path in files if path.parts[0] == root}
    assert entries - BESIDE_LOOPSWAY.get(root, set()) == {"loopsway"}


def test_no_folder_named_loopsway_has_an_init_file_that_would_hide_the_others(files: list[Path]) -> None:
    assert not [str(path) for path in files if path.name.startswith("__init__.py") and path.parent.name == "loopsway"]


def test_loopsway_folders_hold_the_known_packages_alone(files: list[Path]) -> None:
    found = {"/".join(path.parts[:3]) for path in files if is_source(path)}
    assert found == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_typed_and_has_a_docstring(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert (ROOT / package / "__init__.py").read_text(encoding="utf-8").startswith('"""')


def test_the_wheel_holds_every_file_of_the_packages(wheel: zipfile.ZipFile, files: list[Path]) -> None:
    expected = {str(Path(*path.parts[1:])) for path in files if is_source(path)}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_a_base_install_requires_grpcio_protobuf_and_numpy_alone(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = HeaderParser().parsestr(wheel.read(name).decode())
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in required} == {"grpcio", "protobuf", "numpy"}
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_client_imports_nothing_but_what_a_base_install_has() -> None:
    code = "import sys, loopsway.client; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-W", "error", "-I", "-c", code], check=True, capture_output=True, text=True)
    # typing_extensions comes with grpcio, which looks for its own companions (grpc_tools, grpc_health) by itself.
    allowed = {"loopsway", "numpy", "google", "typing_extensions", "cython_runtime", "distutils", "sitecustomize"}
    imported = {name for name in done.stdout.split() if not name.startswith(("_", "grpc"))}
    assert imported - allowed - sys.stdlib_module_names == set()
