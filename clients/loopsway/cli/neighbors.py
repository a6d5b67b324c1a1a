"""`loopsway neighbors`: training examples with gradients alike, of one example or all near-duplicates."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import click

from .failure import in_one_line, needs, stoppable

if TYPE_CHECKING:
    from loopsway.indexer import Index, Neighbors

DUPLICATE = 0.95


@click.command(short_help="Find training examples with gradients alike, or all near-duplicates.")
@click.argument("path")
@click.option("--id", "ids", metavar="ID", multiple=True, help="Of a training example; may be repeated.")
@click.option("--all", "every", is_flag=True, help="All pairs above the threshold, as Parquet in --out.")
@click.option("--k", type=click.IntRange(min=1), help="At most so many for each id.  [default: 10, or no limit]")
@click.option(
    "--by",
    type=click.Choice(["cosine", "inner-product"]),
    default="cosine",
    show_default=True,
    help="How alike: the angle alone, or the influence of one on the other.",
)
@click.option("--threshold", type=float, help=f"The least similarity.  [default with --all: {DUPLICATE}]")
@click.option("--step", type=int, help="Of the loop.  [default: gradients summed over steps]")
@click.option("--where", metavar="FILTER", help="Only among some examples, such as 'length < 200'.")
@click.option("--out", metavar="FOLDER", help="--all: an empty folder, or one to go on with.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, and nothing else.")
def neighbors(
    path: str,
    ids: tuple[str, ...],
    every: bool,
    k: int | None,
    by: str,
    threshold: float | None,
    step: int | None,
    where: str | None,
    out: str | None,
    as_json: bool,
) -> None:
    """Shows which training examples of the index at PATH have gradients most like some examples'.

    It reads stored codes alone and runs no model. With --all it compares every example with every other.
    """
    if every == bool(ids) or every != (out is not None):
        raise click.UsageError("ask about --id ID, as often as needed; or give --all with --out FOLDER")
    if every and (k is not None or where is not None or by != "cosine" or as_json):
        raise click.UsageError("--all takes --threshold, --step and --out: it writes every pair of that cosine")
    with in_one_line(), needs("comparing examples needs the indexer", "indexer,cpu"), stoppable():
        from loopsway.indexer import find_duplicates, find_neighbors, open_index

        index = open_index(path)
        if out is not None:
            limit = DUPLICATE if threshold is None else threshold
            count, names = find_duplicates(index, out, threshold=limit, step=step)
            click.echo(f"{out}: {count:,} pairs of cosine {limit:g} and above, in {len(names)} files")
            return
        found = find_neighbors(
            index,
            ids,
            k if k is not None or threshold is not None else 10,
            by=cast("Any", by.replace("-", "_")),
            step=step,
            threshold=threshold,
            where=where,
        )
    if as_json:
        click.echo(json.dumps([_document(index, *each) for each in zip(ids, found, strict=True)], indent=2))
    else:
        _show(index, ids, found, by)


def _document(index: Index, example_id: str, found: Neighbors) -> dict[str, Any]:
    return {
        "id": example_id,
        "neighbors": [
            {
                "id": each,
                "description": index.example(int(row)).description,
                "similarity": float(similarity),
                "standard_error": float(error),
            }
            for each, row, similarity, error in zip(
                found.example_ids, found.rows, found.similarities, found.standard_errors, strict=True
            )
        ],
    }


def _show(index: Index, ids: tuple[str, ...], found: list[Neighbors], by: str) -> None:
    with needs("printing tables needs the command's extra", "cli"):
        from rich.console import Console
        from rich.text import Text

        from .tables import listing
    console = Console()
    for example_id, own in zip(ids, found, strict=True):
        table = listing([by, "±", "id", "description"], title=f"like {example_id}", text=["id", "description"])
        for each in _document(index, example_id, own)["neighbors"]:
            numbers = f"{each['similarity']:.4g}", f"{each['standard_error']:.1g}"
            table.add_row(*numbers, Text(each["id"]), Text(each["description"]))
        console.print(table)
