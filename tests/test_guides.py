"""The code in the guides beside the sources works as it is printed."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from loopsway.cli.child import running_server
from loopsway.cli.commands import loopsway

ROOT = Path(__file__).parents[1]
GUIDES = ("indexer", "service", "clients")


def blocks(guide: str, language: str) -> list[str]:
    text = (ROOT / guide / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the guide's task, and the index that its commands build."""
    folder = tmp_path_factory.mktemp("guides")
    [task] = blocks("indexer", "python file=sums.py")
    (folder / "sums.py").write_text(task)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in blocks("indexer", "bash")[0].splitlines():
            done = CliRunner().invoke(loopsway, shlex.split(line)[1:])
            assert done.exit_code == 0, (line, done.output)
    return folder


def test_the_guides_python_on_indices_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    build, read = blocks("indexer", "python")
    try:
        exec(build, {})
        exec(read, {})
    finally:
        sys.modules.pop("sums", None)
    said = capsys.readouterr().out
    assert said.startswith("334 4 ")
    residues = [float(each) for each in re.findall(r"[-+.\de]+", said.splitlines()[-1])]
    assert max(map(abs, residues)) < 1e-4


def test_the_guides_session_with_a_server_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    [command] = blocks("service", "bash")
    with running_server([], folder, shlex.split(command)[2:]) as port:
        exec(blocks("clients", "python")[0].replace("50051", str(port)), {})
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "sums 334 4"
    found = [line.split()[0] for line in rest[:-2]]
    assert found
    assert all(sum(map(int, example)) % 10 == 6 for example in found)
    assert rest[-2] == str(found)
    assert float(rest[-1]) > 0


@pytest.mark.parametrize("guide", GUIDES)
def test_files_that_a_guide_links_to_exist(guide: str) -> None:
    text = (ROOT / guide / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (ROOT / guide / target).exists(), target
