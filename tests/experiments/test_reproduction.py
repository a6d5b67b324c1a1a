"""An experiment leaves real findings; a period is found where there is one, and only there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from loopsway.cli.reproduce import NAMES
from loopsway.experiments.period import period, recurrences
from loopsway.experiments.reproduction import EXPERIMENTS, reproduce


@pytest.mark.parametrize("length", [2, 3, 4, 7, 10])
def test_a_period_is_found_under_noise(length: int) -> None:
    draw = np.random.default_rng(length)
    cycle = draw.standard_normal((length, 5))
    series = np.tile(cycle, (9, 1)) + 0.1 * draw.standard_normal((9 * length, 5))
    assert period(series) == length


def test_what_settles_drifts_or_stands_still_has_no_period() -> None:
    steps = np.arange(40.0)[:, None]
    for series in (np.exp(-steps / 5), steps * [1.0, 2.0], np.ones((40, 3))):
        assert period(series) is None, series[:3]


def test_unrelated_points_recur_by_about_one() -> None:
    found = recurrences(np.random.default_rng(0).standard_normal((4000, 8)), 5)
    # Of 4000 x 8 squared differences the mean has a relative deviation of about sqrt(3 / 32000).
    assert np.abs(found - 1).max() < 5 * np.sqrt(3 / 32000)


def test_the_command_offers_every_experiment() -> None:
    assert tuple(EXPERIMENTS) == NAMES


def test_an_unknown_experiment_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no experiment 'fig9'; name one of fig1, fig2, fig3, fig4, scale"):
        reproduce("fig9", tmp_path)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_writes_data_figure_and_claims(name: str, tmp_path: Path) -> None:
    findings = reproduce(name, tmp_path, size="tiny", progress=False)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "figure.svg").read_bytes()
    table = pq.read_table(tmp_path / "data.parquet")
    assert table.equals(findings.data)
    assert table.num_rows
    claims = json.loads((tmp_path / "claims.json").read_text())["claims"]
    assert claims
    assert all(set(claim) == {"claim", "paper", "seen", "agrees"} for claim in claims)
    assert not [claim for claim in claims if claim["agrees"] is False]
