"""The README's session works as it is printed, on what the demo left."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from loopsway.cli.child import running_server
from loopsway.cli.commands import loopsway

README = Path(__file__).parents[1] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_there_is_a_session_with_a_server_and_one_without() -> None:
    assert [("Client(" in block, "open_index(" in block) for block in python_blocks()] == [
        *((True, False), (False, True)),
        (False, False),  # of the tables that `loopsway score` wrote
    ]


@pytest.mark.timeout(600)  # the first test that asks for the demo trains its model
def test_the_session_over_grpc_works(
    demonstrated: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkout, _ = demonstrated
    monkeypatch.chdir(checkout)
    with running_server(["runs/demo/parity.index"], checkout) as port:
        exec(python_blocks()[0].replace("50051", str(port)), {})
    said = capsys.readouterr().out
    assert len(re.findall(r"^step \d+: [01]+ -> (odd|even)  \+\S+ ± \S+$", said, re.MULTILINE)) == 11


def test_the_session_on_the_index_works(
    demonstrated: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demonstrated[0])
    exec(python_blocks()[1], {})
    assert re.search(r"^\('[01]+', '[01]+', '[01]+'\) \[", capsys.readouterr().out)


@pytest.mark.timeout(600)
def test_the_commands_of_curation_work(
    demonstrated: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(demonstrated[0] / "runs")
    (tmp_path / "eval.jsonl").write_text('{"bits": "0101010101"}\n{"bits": "1110001110"}\n')
    section = README.read_text(encoding="utf-8").split("## Curation")[1]
    commands = re.search(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert commands is not None
    text = commands[1].replace("runs/mine.index", "runs/demo/parity.index").replace("train/7", "0000000000")
    for line in text.splitlines():
        done = CliRunner().invoke(loopsway, shlex.split(line, comments=True)[1:])
        assert done.exit_code == 0, (line, done.output)
    exec(python_blocks()[2], {})
    assert re.match(r"\[\{'id': '[01]+', 'rank': 1, 'influence': ", capsys.readouterr().out)


def test_files_and_links_that_the_readme_names_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (README.parent / target).exists(), target
    tree = text[text.index("## The tree") :].split("```")[1]
    for name in re.findall(r"[a-z0-9_]+\.(?:py|proto)\b", tree):
        assert list(README.parent.glob(f"*/**/{name}")), name
