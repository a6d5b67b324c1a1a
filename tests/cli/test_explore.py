"""`loopsway explore`, as a process of its own: it says where it is, answers, and ends in order."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from pathlib import Path
from urllib.request import ProxyHandler, Request, build_opener

import pytest

from ..conftest import COMMAND
from .conftest import invoke

ASK = build_opener(ProxyHandler({})).open


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_answers_from_the_server_until_a_signal(target: str, number: signal.Signals) -> None:
    command = [*COMMAND, "explore", "--server", target, "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        try:
            said = re.fullmatch(rf"exploring {re.escape(target)} at (http://127\.0\.0\.1:\d+/)\n", line)
            assert said is not None, line
            request = Request(f"{said[1]}api/indices", b"{}", {"Content-Type": "application/json"})
            with ASK(request, timeout=60) as response:
                assert [index["name"] for index in json.load(response)["indices"]] == ["tiny"]
        finally:
            child.send_signal(number)
            output, errors = child.communicate(timeout=60)
    assert (child.returncode, output, errors) == (0, "", "")


def test_an_address_that_others_reach_is_a_usage_error() -> None:
    result = invoke(["explore", "--host", "0.0.0.0", "--no-browser"])
    assert result.exit_code == 2
    assert "host 0.0.0.0 is not loopback" in result.stderr


def test_a_certificate_that_can_not_be_read_is_told_before_anything_listens(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    result = invoke(["explore", "--cert", tmp_path / "cert.pem", "--no-browser"])
    assert result.exit_code == 2, result.output
    assert "key" in result.stderr
