"""Tables, the chart and the figure: what they show of numbers that are known."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from loopsway.cli import chart, figure, rankings
from loopsway.cli.answers import Answer
from loopsway.cli.curves import Curve, Curves, number, shortened
from loopsway.cli.tables import BAR_CELLS, bar
from loopsway.client import Influencer, InfluenceResult, QuerySummary, Ranking


def influencer(name: str, influence: float, error: float) -> Influencer:
    return Influencer(example_id=name, description="", metadata={}, influence=influence, standard_error=error)


def curves(*influences: list[float], label: str = "a") -> Curves:
    drawn = [
        Curve(label=label, total=sum(values), influences=values, standard_errors=[0.1] * len(values))
        for values in influences
    ]
    return Curves(title="asked", axis="step", curves=drawn, without_gradient=(0,))


def drawn(what: Curves) -> str:
    console = Console(file=io.StringIO(), width=100)
    chart.draw(what, console)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_influences_within_two_standard_errors_are_marked_and_dim() -> None:
    total = Ranking(step=None, proponents=(influencer("sure", 1, 0.4), influencer("unsure", 1, 0.5)), opponents=())
    first = Ranking(step=0, proponents=(), opponents=(influencer("hurts", -3, 0.1),))
    result = InfluenceResult(
        recall=1.0,
        coverage=1.0,
        query=QuerySummary(num_steps=1, losses=(0.5,), steps_without_gradient=(0,)),
        total=total,
        steps=(first,),
        index="i",
        generation=1,
        fingerprint="f",
    )
    answer = Answer(question="[bold]?", resolve="query_step", result=result)
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system="standard")
    rankings.show(answer, console)
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)
    assert re.search(r"sure +\+1 ", plain)
    assert re.search(r"unsure +~\+1 ", plain)
    assert "\x1b[2munsure" in text
    assert re.search(r"hurts +-3 ", plain)
    assert "query: [bold]?" in plain  # a question is text, never markup
    assert "step 0  no gradient at this step in training" in plain


def test_an_answer_says_that_it_has_no_influence_and_misses_shards() -> None:
    nothing = Ranking(step=None, proponents=(), opponents=())
    summary = QuerySummary(num_steps=1, losses=(), steps_without_gradient=())
    result = InfluenceResult(
        recall=1.0, coverage=0.75, query=summary, total=nothing, steps=(), index="i", generation=1, fingerprint="f"
    )
    answer = Answer(question="?", resolve="query_step", result=result)
    console = Console(file=io.StringIO(), width=100)
    rankings.show(answer, console)
    printed = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "none" in printed
    assert "only 75% of the index's shards answered" in printed
    assert answer.curves(3).curves == []
    assert answer.to_json()["trajectories"]["example_ids"] == []
    drawn(answer.curves(3))


def test_the_chart_has_a_tick_for_each_step_and_the_legend_each_total() -> None:
    text = drawn(curves([3.0, 2.0, 1.0], [-1.0, -2.0, -1.5], label="an [example]"))
    assert re.search(r"^ +0 +1 +2 *$", text, re.MULTILINE)
    assert re.search(r"━━ +\+6 +an \[example\]", text)
    assert re.search(r"━━ +-4\.5 +an \[example\]", text)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1.0], [1e-20, 3e-20], [5e8, -5e8]])
def test_extreme_influences_can_be_drawn(tmp_path: Path, values: list[float]) -> None:
    drawn(curves(values))
    figure.save(curves(values), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_a_wide_range_gets_a_logarithmic_scale_and_a_narrow_one_does_not(tmp_path: Path) -> None:
    for values, is_wide in (([100.0, 1.0, 0.5, 0.1], True), ([3.0, 2.0, 1.0, 0.5], False)):
        figure.save(curves(values), tmp_path / "a.svg")
        assert ("influence, logarithmic" in (tmp_path / "a.svg").read_text()) == is_wide


def test_a_dollar_sign_or_an_underscore_in_a_description_is_text(tmp_path: Path) -> None:
    figure.save(curves([1.0, 2.0], label="_costs $5 or $x_1"), tmp_path / "a.svg")
    assert "_costs $5 or $x_1" in (tmp_path / "a.svg").read_text()


def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        figure.save(curves([1.0, 2.0]), tmp_path / name)
    dated = re.compile(rb"<dc:date>.*?</dc:date>")
    first, second = (dated.sub(b"", (tmp_path / name).read_bytes()) for name in ("a.svg", "b.svg"))
    assert first == second


def test_numbers_have_three_digits_and_bars_fill_their_cells() -> None:
    assert [number(0.012345), number(1234.5), number(-12.3, signed=True)] == ["0.0123", "1,234", "-12.3"]
    assert number(1234.5, signed=True) == "+1,234"
    assert [bar(0), bar(0.5), bar(1), bar(2)] == ["", "█" * (BAR_CELLS // 2), "█" * BAR_CELLS, "█" * BAR_CELLS]
    assert shortened("two\nlines", 20) == "two lines"
    assert shortened("a long text", 6) == "a lon…"
