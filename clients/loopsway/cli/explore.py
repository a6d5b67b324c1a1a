"""`loopsway explore`: a page in the browser that asks a running server."""

from __future__ import annotations

import webbrowser

import click

from .connection import Connection, connection_options
from .failure import in_one_line, needs


@click.command(short_help="Explore answers in the browser.")
@connection_options
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, show_default=True, help="0 picks a free one.")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds to wait for each answer.")
@click.option("--no-browser", is_flag=True, help="Print the address and open nothing.")
@click.option("--insecure-bind", is_flag=True, help="Allow a --host that others reach, without TLS or passwords.")
def explore(
    connection: Connection, host: str, port: int, timeout_s: float, no_browser: bool, insecure_bind: bool
) -> None:
    """Serves a page that asks the server: trajectories, rankings at each step, step matrices and filters.

    It runs until Ctrl-C or SIGTERM. The page fetches nothing from elsewhere.
    """
    with needs("exploring needs its extra", "explorer"):
        from loopsway import explorer
    connection.client(timeout_s).close()  # what is wrong with a token or a certificate is told here, not by the app
    with in_one_line():
        try:
            bound = explorer.Explorer.bind(
                lambda: connection.async_client(timeout_s), host=host, port=port, insecure_bind=insecure_bind
            )
        except ValueError as error:
            raise click.UsageError(str(error)) from error
        click.echo(f"exploring {connection.server} at {bound.url}")
        if not no_browser:
            webbrowser.open(bound.url)
        explorer.serve(bound)
