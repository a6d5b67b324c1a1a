"""`loopsway verify`: whether an index is what its build wrote."""

from __future__ import annotations

import sys

import click

from .failure import in_one_line, needs


@click.command(short_help="Read a whole index and name what is damaged.")
@click.argument("path")
def verify(path: str) -> None:
    """Reads everything that the index at PATH consists of and compares it with the digests that its build kept.

    Prints one line for each damaged piece; the exit code is 1 if there is any.
    """
    with in_one_line(), needs("verifying needs the indexer", "indexer,cpu"):
        from loopsway.indexer import verify_index

        damages = verify_index(path)
    for damage in damages:
        click.echo(str(damage))
    if damages:
        click.echo(
            f"Error: {path} is damaged: {len(damages)} pieces are not what its build wrote; rebuild it", err=True
        )
        sys.exit(1)
    click.echo(f"{path}: every piece is what its build wrote")
