"""The code in the guides beside the sources works as it is printed."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
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
        for line in "".join(blocks("indexer", "bash")).splitlines():
            done = CliRunner().invoke(loopsway, shlex.split(line)[1:])
            assert done.exit_code == 0, (line, done.output)
    return folder


@pytest.fixture
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where the guide's `from sums import ...` finds the task."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield
    sys.modules.pop("sums", None)


@pytest.mark.usefixtures("in_folder")
def test_the_guides_python_on_indices_works(capsys: pytest.CaptureFixture[str]) -> None:
    build, search, read, *_ = blocks("indexer", "python")
    exec(build, {})
    assert capsys.readouterr().out.startswith("334 4 ")
    exec(search, {})
    recalls, within = capsys.readouterr().out.splitlines()
    assert recalls.split()[0] == "1.0"
    assert 0.95 <= float(recalls.split()[1]) <= 1
    assert all(sum(map(int, digits)) % 10 == 6 for digits in re.findall(r"\d+", within))
    exec(read, {})
    residues = [float(each) for each in re.findall(r"[-+.\de]+", capsys.readouterr().out.splitlines()[-1])]
    assert max(map(abs, residues)) < 1e-4


@pytest.mark.usefixtures("in_folder")
def test_what_the_guide_says_of_truncation_adam_and_noise_is_so(capsys: pytest.CaptureFixture[str]) -> None:
    *_, truncated, adam, noise = blocks("indexer", "python")
    found: dict[str, Any] = {}
    exec(truncated, found)
    assert found["cut"].steps_without_gradient == (0, 1)
    torch.testing.assert_close(found["cut"].values[:, 2:], found["whole"].values[:, 2:])
    exec(adam, {})
    plain, aware = (
        float(size) for size in re.findall(r"tensor\(\[([\d.e+]+),", capsys.readouterr().out.split("(0, 1)")[1])[-2:]
    )
    assert aware > 30 * plain, "their sizes are said to differ by orders of magnitude"
    exec(noise, {})
    said = capsys.readouterr().out
    inside, first, *alike, lift = (float(each) for each in re.findall(r"\d+\.\d+", said.replace("float64", "")))
    assert 0.9 < inside < 1
    assert first == 1
    assert min(alike) > 0.7, "neighbouring steps' noise is said to be alike"
    assert lift > 1.1, "the best are said to be the best in part by luck"


@pytest.mark.usefixtures("in_folder")
def test_the_guides_session_with_a_server_works(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = blocks("service", "bash")[0]
    with running_server([], folder, shlex.split(command)[2:]) as port:
        exec(blocks("clients", "python")[0].replace("50051", str(port)), {})
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == "sums 334 4"
    found = [line.split()[0] for line in rest[:-2]]
    assert found
    assert all(sum(map(int, example)) % 10 == 6 for example in found)
    assert rest[-2] == str(found)
    assert float(rest[-1]) > 0


@pytest.mark.usefixtures("in_folder")
def test_the_guides_settings_are_served_and_the_server_is_well(folder: Path) -> None:
    def run(line: str) -> str:
        done = CliRunner().invoke(loopsway, shlex.split(line, comments=True)[1:])
        assert done.exit_code == 0, (line, done.output)
        return done.output

    [settings] = blocks("service", "toml file=serve.toml")
    (folder / "serve.toml").write_text(settings.replace("9464", "0"))
    check, serve = blocks("service", "bash")[1].splitlines()
    assert "sums" in run(check)
    with running_server([], folder, shlex.split(serve)[2:]) as port:
        health, query, bench = blocks("service", "bash")[2].replace("50051", str(port)).splitlines()
        assert run(health) == "SERVING\n"
        assert "3 + 1 + 2 = 6 (mod 10)" in run(query)
        assert "p95" in run(bench)


@pytest.mark.parametrize("guide", GUIDES)
def test_files_that_a_guide_links_to_exist(guide: str) -> None:
    text = (ROOT / guide / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(((?!http)[^)#]+)", text):
        assert (ROOT / guide / target).exists(), target
