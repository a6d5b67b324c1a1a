"""What the command says before it does anything: help, quickly, and what is missing."""

from __future__ import annotations

import subprocess
import sys
import time
from importlib.metadata import entry_points

import pytest
from click.testing import Result

from .conftest import COMMAND, invoke, run

COMMANDS = (
    *("train", "build", "add", "delete", "compact", "prune", "inspect", "verify"),
    *("serve", "query", "explore", "demo"),
)


def run_without(modules: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process where importing any of these modules fails as if it were not installed."""
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {modules.split()!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        f"sys.argv = ['loopsway', *{list(arguments)!r}]\n"
        "from loopsway.cli.main import main\n"
        "main()\n"
    )
    return subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60)


def test_help_lists_the_commands_and_imports_nothing_heavy_in_half_a_second() -> None:
    heavy = "torch faiss zarr pyarrow numpy grpc matplotlib plotext"
    durations: list[float] = []
    for _ in range(3):
        started = time.monotonic()
        done = run_without(heavy, "--help")
        durations.append(time.monotonic() - started)
        assert done.returncode == 0, done.stderr
        assert all(f"\n  {command} " in done.stdout for command in COMMANDS)
    assert min(durations) < 0.5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_names_its_options(command: str) -> None:
    result: Result = invoke([command, "--help"])
    assert result.exit_code == 0
    assert f"Usage: loopsway {command}" in result.stdout


def test_the_script_is_the_same_command() -> None:
    (script,) = entry_points(group="console_scripts", name="loopsway")
    assert script.value == "loopsway.cli.main:main"
    done = subprocess.run([*COMMAND, "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("loopsway 0.")


def test_a_base_install_says_in_one_line_how_to_get_the_command() -> None:
    done = run_without("click rich", "--help")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "loopsway: the command needs click: pip install 'loopsway[cli]'\n"


@pytest.mark.parametrize(
    ("missing", "arguments", "line"),
    [
        ("torch", "train parity", "training needs the indexer: pip install 'loopsway[indexer,cpu]'"),
        ("torch", "build --task parity --out x", "building needs the indexer: pip install 'loopsway[indexer,cpu]'"),
        ("torch", "inspect x", "inspecting needs the indexer: pip install 'loopsway[indexer,cpu]'"),
        ("grpc_health", "serve --index x", "serving needs the service: pip install 'loopsway[service,cpu]'"),
        ("torch", "serve --index x", "serving needs the service: pip install 'loopsway[service,cpu]'"),
        ("starlette", "explore", "exploring needs its extra: pip install 'loopsway[explorer]'"),
        ("plotly", "explore", "exploring needs its extra: pip install 'loopsway[explorer]'"),
        ("torch", "demo", "the demo needs what one machine runs: pip install 'loopsway[all]'"),
    ],
)
def test_a_missing_extra_is_named_in_one_line(missing: str, arguments: str, line: str) -> None:
    done = run_without(missing, *arguments.split())
    assert done.returncode == 1
    assert done.stderr == f"Error: {line}\n"


def test_query_needs_neither_torch_nor_faiss_nor_zarr() -> None:
    done = run_without("torch faiss zarr pyarrow safetensors", "query", "--server", "127.0.0.1:1", "--id", "a")
    assert done.returncode == 1
    assert done.stderr.startswith("Error: no Loopsway server answers at 127.0.0.1:1")


def test_an_unknown_command_is_a_usage_error() -> None:
    done = run("ask")
    assert done.returncode == 2
    assert "No such command 'ask'" in done.stderr
