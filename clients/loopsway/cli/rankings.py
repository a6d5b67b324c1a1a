"""An answer as tables in the terminal. Knows rich, and the client's results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .answers import Answer, name
from .curves import number, shortened

if TYPE_CHECKING:
    from loopsway.client import Influencer, Ranking

NUMBERS_WIDTH = 43  # what one line of a table needs beside its two descriptions
NOTE = "±: one standard error. Dim, with ~: within two of them of 0, so it can't be told from no influence"


def show(answer: Answer, console: Console) -> None:
    """Prints a table for each step, and one for the whole loop."""
    result = answer.result
    _heading(answer, console)
    without = set(result.query.steps_without_gradient)
    for ranking in result.steps:
        note = "  no gradient at this step in training: zeros by construction" if ranking.step in without else ""
        console.print(_table(f"step {ranking.step}{note}", ranking, console.width))
        console.print()
    console.print(_table("the whole loop", result.total, console.width))
    console.print(Text(NOTE, style="dim"))


def show_briefly(answer: Answer, console: Console) -> None:
    """Prints one line for each step, its strongest proponent and opponent, and the table for the whole loop."""
    _heading(answer, console)
    table = _columns("at each step, the strongest", console.width, first="step")
    for ranking in answer.result.steps:
        table.add_row(str(ranking.step), *_pair(ranking.proponents[:1], ranking.opponents[:1], 0, console.width))
    console.print(table)
    console.print()
    console.print(_table("over the whole loop", answer.result.total, console.width))
    console.print(Text(NOTE, style="dim"))


def _heading(answer: Answer, console: Console) -> None:
    query = answer.result.query
    console.print(Text(f"query: {answer.question}", style="bold"))
    facts = f"index {answer.result.index}, generation {answer.result.generation}; {query.num_steps} steps"
    if answer.result.recall < 1:
        facts += f"; approximate, recall {answer.result.recall:.3f} when built"
    if answer.result.coverage < 1:
        facts += f"; only {answer.result.coverage:.0%} of the index's shards answered"
    if query.losses:
        facts += f"; loss at each checkpoint: {', '.join(f'{loss:.3g}' for loss in query.losses)}"
    console.print(Text(facts, style="dim"))
    console.print()


def _table(title: str, ranking: Ranking, width: int) -> Table:
    table = _columns(title, width, first="")
    for place in range(max(len(ranking.proponents), len(ranking.opponents))):
        table.add_row(str(place + 1), *_pair(ranking.proponents, ranking.opponents, place, width))
    if not table.row_count:
        none = Text("none", style="dim")
        table.add_row("", none, "", "", "", none, "", "")
    return table


def _columns(title: str, width: int, *, first: str) -> Table:
    described = _description_width(width)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(first, justify="right", style="dim", min_width=4)
    for kind in ("proponents", "opponents"):
        if kind == "opponents":
            table.add_column("")  # a gap
        table.add_column(kind, no_wrap=True, width=described, header_style="bold")
        table.add_column("influence", justify="right", no_wrap=True, min_width=9)
        table.add_column("±", justify="right", no_wrap=True, min_width=7)
    return table


def _description_width(width: int) -> int:
    return max(12, min(40, (width - NUMBERS_WIDTH) // 2))


def _pair(proponents: Sequence[Influencer], opponents: Sequence[Influencer], place: int, width: int) -> list[Text]:
    cells: list[Text] = []
    for side, style in ((proponents, "cyan"), (opponents, "red")):
        cells += [Text()] if cells else []
        cells += _cells(side[place], style, width) if place < len(side) else [Text(), Text(), Text()]
    return cells


def _cells(influencer: Influencer, style: str, width: int) -> list[Text]:
    mark = " " if influencer.significant else "~"
    return [
        Text(shortened(name(influencer), _description_width(width)), style="" if influencer.significant else "dim"),
        Text(f"{mark}{number(influencer.influence, signed=True)}", style=style if influencer.significant else "dim"),
        Text(number(influencer.standard_error, digits=2), style="dim"),
    ]
