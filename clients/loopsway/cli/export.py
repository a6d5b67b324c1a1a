"""`loopsway export`: the sketches of an index, for other tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import click

from .failure import in_one_line, needs, stoppable

if TYPE_CHECKING:
    from loopsway.indexer.building.export import ExportFormat


@click.command(short_help="Write an index's sketches as Parquet or safetensors.")
@click.argument("path")
@click.option("--out", metavar="FOLDER", required=True, help="An empty folder, or one to go on with.")
@click.option("--format", "kind", type=click.Choice(["parquet", "safetensors"]), default="parquet", show_default=True)
def export(path: str, out: str, kind: str) -> None:
    """Writes the sketches of the index at PATH as float32, for other tools.

    Deleted and skipped examples are left out. The inner product of a sketch with a query's is its influence. Stopped
    or killed and run again, it goes on where it was.
    """
    with in_one_line(), needs("exporting needs the indexer", "indexer,cpu"), stoppable():
        from loopsway.indexer import export_index

        names = export_index(path, out, format=cast("ExportFormat", kind))
    click.echo(f"{out}: examples.parquet and {len(names)} files of sketches, {names[0]} to {names[-1]}")
