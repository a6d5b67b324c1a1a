"""The README's session works as it is printed, on what the demo left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loopsway.cli.child import running_server

README = Path(__file__).parents[1] / "README.md"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_there_is_a_session_with_a_server_and_one_without() -> None:
    assert [("Client(" in block, "open_index(" in block) for block in python_blocks()] == [(True, False), (False, True)]


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


def test_files_and_links_that_the_readme_names_exist() -> None:
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(((?!http)[^)]+)\)", text):
        assert (README.parent / target).exists(), target
    tree = text[text.index("## The tree") :].split("```")[1]
    for name in re.findall(r"[a-z0-9_]+\.(?:py|proto)\b", tree):
        assert list(README.parent.glob(f"*/**/{name}")), name
