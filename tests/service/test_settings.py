"""Settings come from flags, the environment, a file and defaults, in this order; what is wrong is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loopsway.service import Settings, SettingsError, check_settings, read_settings
from loopsway.service.catalog import Catalog
from serving import TASK_SPEC, asked_for, without_model


def written(folder: Path, text: str) -> Path:
    path = folder / "serve.toml"
    path.write_text(text)
    return path


def test_flags_go_before_the_environment_before_the_file_before_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path, "port = 1\nmax_k = 1\nmax_steps = 1\nindices = ['a', {path = 'b', model = false}]\n")
    monkeypatch.setenv("LOOPSWAY_PORT", "2")
    monkeypatch.setenv("LOOPSWAY_MAX_K", "2")
    settings = read_settings({"port": 3}, file=file)
    assert (settings.port, settings.max_k, settings.max_steps, settings.max_queries) == (3, 2, 1, 64)
    assert [(index.path, index.model) for index in settings.indices] == [("a", True), ("b", False)]
    assert Settings(max_k=5).port == 50051, "made in Python, settings must not depend on the environment"


def test_a_list_in_a_variable_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPSWAY_INDICES", '["a"]')
    assert read_settings().indices[0].path == "a"
    monkeypatch.setenv("LOOPSWAY_INDICES", "[broken")
    with pytest.raises(SettingsError, match=r'"indices".*expected JSON') as caught:
        read_settings()
    assert "broken" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("porrt = 7", r"porrt is no setting; the settings are indices, aliases, host, port,"),
        (
            "[[indices]]\npath = 'x'\ntsk = 'y'",
            r"indices\[0\].tsk is no setting; .* of indices\[0\] are path, name, task,",
        ),
        ("[[indices]]\ntask = 'y'", r"indices\[0\].path: missing"),
        ("port = 70000", "port is 70000, expected less than or equal to 65535"),
        ("max_k = 'many'", "max_k is 'many', expected a valid integer"),
        ("max_connection_age_s = inf", "max_connection_age_s is inf, expected less than or equal to 2000000"),
        ("grace_s = nan", "grace_s is nan, expected a finite number"),
        ("port =", "is not TOML"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        read_settings(file=written(tmp_path, text))


def test_an_unknown_variable_is_named_beside_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOPSWAY_CACHE", "LOOPSWAY_CACHE_BYTES", "LOOPSWAY_TOKEN"):
        monkeypatch.setenv(name, "1")
    read_settings()
    monkeypatch.setenv("LOOPSWAY_PORRT", "7")
    with pytest.raises(SettingsError, match=r"LOOPSWAY_PORRT is no variable .*LOOPSWAY_PORT, "):
        read_settings()


def test_the_check_opens_every_index(index_path: Path, tmp_path: Path) -> None:
    served = without_model(index_path)
    (line,) = check_settings(Settings(indices=[served]))
    assert line == "index tiny: 48 examples, generation 1, without its model"
    with pytest.raises(OSError, match="there is no index at"):
        check_settings(Settings(indices=[served, str(tmp_path / "none.index")]))
    with pytest.raises(SettingsError, match="both named tiny; give one another name"):
        check_settings(Settings(indices=[served] * 2))
    with pytest.raises(SettingsError, match="alias live is of index none, the indices are tiny"):
        check_settings(Settings(indices=[served], aliases={"live": "none"}))
    with pytest.raises(SettingsError, match="indices is empty"):
        check_settings(Settings())


def test_the_check_refuses_what_a_server_would_not_start_with(index_path: Path) -> None:
    (line,) = check_settings(Settings(indices=[asked_for(index_path)]))
    assert line.endswith(f"task {TASK_SPEC}")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"task": None}, "its code only runs when you name it"),
        ({"task": "none.py:Task"}, "task file none.py of index tiny does not exist"),
        ({"model": False}, "served without its model; drop one"),
        ({"workers": 2}, 'give engine "ray" too'),
        ({"device": "warp"}, "device 'warp' can't be used"),
    ]
    for given, text in wrong:
        settings = Settings(indices=[asked_for(index_path).model_copy(update=given)])
        for check in (check_settings, Catalog):
            with pytest.raises(ValueError, match=text):
                check(settings)


def test_the_check_tries_the_device_of_a_model_whose_index_is_read_in_a_cluster(index_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed; pip install 'loopsway[ray]'")
    there = {"engine": "ray", "device": "warp"}
    with pytest.raises(ValueError, match="device 'warp' can't be used"):
        check_settings(Settings(indices=[asked_for(index_path).model_copy(update=there)]))
    assert check_settings(Settings(indices=[without_model(index_path).model_copy(update=there)]))
