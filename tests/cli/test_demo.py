"""`loopsway demo`, end to end: a real index of the real run, a real server, and what a second run uses again."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import click
import pytest

from loopsway.cli.child import running_server
from loopsway.indexer import open_index

from ..conftest import run_demo


def processes_that_name(text: str) -> list[str]:
    """Their command lines, on Linux; elsewhere none."""
    lines: list[str] = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended meanwhile
            lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in lines if text in line]


@pytest.mark.timeout(600)  # the first test that asks for it trains the model
def test_the_demo_answers_and_a_second_run_uses_what_exists(demonstrated: tuple[Path, str]) -> None:
    checkout, said = demonstrated
    folder = checkout / "runs" / "demo"
    for stage in range(1, 7):
        assert re.search(rf"^{stage}\. .*─", said, re.MULTILINE), said
    assert "is trained already" in said
    assert "figure: runs/demo/trajectory.png" in said
    assert (folder / "trajectory.png").read_bytes().startswith(b"\x89PNG\r\n")
    # The second answer is about a training string: it is the first of its own proponents, over the whole loop.
    known = re.search(r"^5\. ask about ([01]+), the training string", said, re.MULTILINE)
    assert known is not None, said
    assert re.search(rf"over the whole loop\s+\n.*\n +1 +{known[1]} ", said[known.end() :]), said
    assert not processes_that_name("runs/demo/parity.index"), "the server outlived the demo"
    assert not (folder / "serve.ready").exists()

    created = open_index(folder / "parity.index").created_at
    again = run_demo(checkout)
    assert open_index(folder / "parity.index").created_at == created
    without_times = re.compile(r"[\d.]+ s\b|127\.0\.0\.1:\d+|.*sketching.*\n|.*indexing.*\n")
    assert without_times.sub("", again) == without_times.sub("", said)


def test_a_server_that_can_not_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(click.ClickException, match=r"exit code 1: Error: there is no index at"),
        running_server([str(tmp_path / "none.index")], tmp_path),
    ):
        pytest.fail("it must not come to this")
