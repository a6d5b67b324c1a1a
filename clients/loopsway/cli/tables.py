"""Tables and pairs as the commands print them. Knows rich, and nothing of indices or servers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.table import Table
from rich.text import Text

EIGHTHS = " ▏▎▍▌▋▊▉"
BAR_CELLS = 24


def pairs(values: Mapping[str, str]) -> Table:
    """Names and their values, in two columns."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name, Text(value))
    return table


def listing(columns: Iterable[str], *, title: str = "", text: Iterable[str] = ()) -> Table:
    """An empty table with these columns: those named in `text` are left-aligned, the rest are numbers."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
    in_text = set(text)
    for column in columns:
        if column in in_text:
            table.add_column(column, overflow="ellipsis")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def bar(part: float) -> str:
    """A bar for a part from 0 to 1, in eighths of a cell."""
    eighths = round(max(0.0, min(1.0, part)) * BAR_CELLS * 8)
    return ("█" * (eighths // 8) + EIGHTHS[eighths % 8]).strip()
