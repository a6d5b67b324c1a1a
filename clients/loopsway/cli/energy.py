"""`loopsway energy`: how much influence goes through each step of the loop."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import click

from .failure import in_one_line, needs
from .query import RESOLVE
from .query_sets import query_set_options, read_query_set

if TYPE_CHECKING:
    from loopsway.indexer import Index, QuerySet

TOGETHER = 64  # queries in one pass over the codes
SHOWN = ("energies", "shares", "signed_shares")


@click.command(short_help="Show how much influence goes through each step.")
@click.argument("path")
@query_set_options
@click.option(
    "--resolve", type=click.Choice(RESOLVE), default="query-step", show_default=True, help="Whose steps, as in query."
)
@click.option("--where", metavar="FILTER", help="Only of some examples, such as 'source == \"web\" and length < 200'.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, with each query's numbers.")
def energy(path: str, asked: dict[str, Any], resolve: str, where: str | None, as_json: bool) -> None:
    """Shows the energy (sum of |influence| over training examples) and signed share of each step of the index at PATH.

    Shares are the queries' median, with the middle half of them; and, for one query, with its standard error.
    """
    with in_one_line(), needs("energies need the indexer", "indexer,cpu"):
        from loopsway.indexer import open_index

        index = open_index(path)
        queries = read_query_set(index, asked)
        document = describe(index, queries, resolve.replace("-", "_"), where)
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _show(document)


def describe(index: Index, queries: QuerySet, resolve: str, where: str | None) -> dict[str, Any]:
    """Each query's energies and shares, as a JSON document."""
    from loopsway.indexer import step_energies

    found: list[dict[str, Any]] = []
    for start in range(0, len(queries), TOGETHER):
        chunk = range(start, min(start + TOGETHER, len(queries)))
        part = step_energies(index, queries.sketches(chunk), cast("Any", resolve), where=where)
        for place, query in enumerate(chunk):
            estimates = {
                name: {
                    "values": getattr(part, name).values[place].tolist(),
                    "standard_errors": getattr(part, name).standard_errors[place].tolist(),
                }
                for name in ("energies", "signed_sums", "shares", "signed_shares")
            }
            found.append({"id": queries.ids[query], **estimates, "raw_energies": part.raw_energies[place].tolist()})
    return {"index": index.name, "resolve": resolve, "where": where, "queries": found}


def _show(document: dict[str, Any]) -> None:
    with needs("printing tables needs the command's extra", "cli"):
        import numpy as np
        from rich.console import Console

        from .tables import bar, listing
    queries = document["queries"]
    one = queries[0] if len(queries) == 1 else None
    if len({len(query["shares"]["values"]) for query in queries}) > 1:
        raise click.ClickException("the queries ran different numbers of steps: take --json, or ask about them apart")
    spread = "±" if one else "middle half"
    table = listing(["step", "energy", "share", spread, "signed share", spread, ""])
    values = {name: np.array([query[name]["values"] for query in queries]) for name in SHOWN}
    median = {name: np.median(each, axis=0) for name, each in values.items()}
    for step in range(len(median["shares"])):
        spreads = [_spread(values[name][:, step], one and one[name]["standard_errors"][step]) for name in SHOWN[1:]]
        table.add_row(
            str(step),
            f"{median['energies'][step]:.3g}",
            f"{median['shares'][step]:.1%}",
            spreads[0],
            f"{median['signed_shares'][step]:+.1%}",
            spreads[1],
            bar(median["shares"][step] / max(median["shares"].max(), 1e-300)),
        )
    Console().print(table)


def _spread(values: Any, error: float | None) -> str:
    import numpy as np

    if error is not None:
        return f"{error:.1%}"
    low, high = np.percentile(values, [25, 75])
    return f"{low:.1%} to {high:.1%}"
