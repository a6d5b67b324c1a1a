"""`loopsway health`: what probes ask."""

from __future__ import annotations

import socket
from pathlib import Path

from .conftest import invoke, run


def test_a_server_that_answers_is_serving(target: str) -> None:
    done = run("health", "--server", target)
    assert (done.returncode, done.stdout, done.stderr) == (0, "SERVING\n", "")
    assert invoke(["health", "--server", target, "--index", "tiny"]).exit_code == 0
    result = invoke(["health", "--server", target, "--index", "other"])
    assert (result.exit_code, result.stderr) == (1, f"Error: {target} has no index 'other'\n")


def test_where_nobody_listens_is_a_line_and_a_failure(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        server = f"127.0.0.1:{taken.getsockname()[1]}"
        result = invoke(["health", "--server", server, "--timeout", "0.5"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {server} does not answer: ")
    assert invoke(["health", "--ca", tmp_path / "none.pem"]).exit_code == 2
