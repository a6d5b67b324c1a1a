"""`loopsway score`: every training example's influence on a set of queries, or on itself, as Parquet."""

from __future__ import annotations

from typing import Any, cast

import click

from .failure import in_one_line, needs, stoppable
from .query import RESOLVE
from .query_sets import named, query_set_options, read_query_set

SHARE = click.FloatRange(0, 1, min_open=True)


@click.command(short_help="Score every training example on a query set, as Parquet.")
@click.argument("path")
@click.option("--out", metavar="FOLDER", required=True, help="An empty folder, or one to go on with.")
@query_set_options
@click.option("--self", "on_itself", is_flag=True, help="Each example's influence on itself; runs no model.")
@click.option("--each", is_flag=True, help="Score each query on its own.  [default: their mean]")
@click.option(
    "--resolve", type=click.Choice(RESOLVE), default="query-step", show_default=True, help="Whose steps, as in query."
)
@click.option("--where", metavar="FILTER", help="Only some examples, such as 'source == \"web\" and length < 200'.")
@click.option("--top", type=SHARE, metavar="SHARE", help="Keep this share of the examples, of largest influence.")
@click.option("--bottom", type=SHARE, metavar="SHARE", help="Keep this share of the examples, of smallest influence.")
def score(
    path: str,
    out: str,
    asked: dict[str, Any],
    on_itself: bool,
    each: bool,
    resolve: str,
    where: str | None,
    top: float | None,
    bottom: float | None,
) -> None:
    """Scores every training example of the index at PATH, in total and at each step.

    The files have a row for each step (null: the total) and example: id, rank, influence, standard_error, significant;
    with --each, for each query too. Shares are kept of each ranking. Stopped or killed and run again, it goes on.
    """
    if on_itself and (each or where is not None or named(asked)):
        raise click.UsageError("--self takes no queries, --each or --where: it reads what is stored of each example")
    with in_one_line(), needs("scoring needs the indexer", "indexer,cpu"), stoppable():
        from loopsway.indexer import open_index, score_examples, score_self_influence

        index = open_index(path)
        if on_itself:
            names, of = score_self_influence(index, out, top=top, bottom=bottom), "self-influence"
        else:
            queries = read_query_set(index, asked)
            names = score_examples(
                index,
                queries,
                out,
                per="each" if each else "mean",
                resolve=cast("Any", resolve.replace("-", "_")),
                where=where,
                top=top,
                bottom=bottom,
            )
            of = f"{'each' if each else 'the mean'} of {len(queries):,} queries"
    click.echo(f"{out}: {index.num_examples:,} examples by {of}, in {names[0]}" + f" to {names[-1]}" * (len(names) > 1))
