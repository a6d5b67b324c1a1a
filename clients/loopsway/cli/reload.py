"""`loopsway reload`: has a server take a new generation over now, for scripts that have published one."""

from __future__ import annotations

import click

from .connection import Connection, connection_options


@click.command(short_help="Have a server take a new generation over.")
@click.argument("index", default="")
@connection_options
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), default=600.0, show_default=True,
    help="Seconds that the server may take to open it and warm it up.",
)  # fmt: skip
def reload(connection: Connection, index: str, timeout_s: float) -> None:
    """Has a server look for a newer generation of INDEX, which may be left out if it serves one, and answer from it.

    It would by itself within seconds; this waits until it does, and fails if the generation is refused. Where the
    server wants tokens, this one's scope must be `admin`.
    """
    from loopsway.client import LoopswayError

    with connection.client(timeout_s) as client:
        try:
            info = client.reload_index(index)
        except LoopswayError as error:
            raise click.ClickException(str(error)) from error
    click.echo(f"{info.name} answers from generation {info.generation}: {info.num_examples:,} examples")
