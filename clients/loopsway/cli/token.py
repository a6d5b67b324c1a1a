"""`loopsway token`: makes a token for one caller of a server."""

from __future__ import annotations

import json

import click

from .failure import needs


@click.command(short_help="Make a token for a caller of a server.")
@click.option("--name", required=True, help="Of the caller, for the server's log.")
@click.option("--read", metavar="INDEX", multiple=True, help="An index that it may ask; may be repeated.  [default: *]")
@click.option(
    "--admin", metavar="INDEX", multiple=True, help="An index that it may also have reloaded; may be repeated."
)
@click.option("--requests-per-second", type=float, help="At most.  [default: any number]")
def token(name: str, read: tuple[str, ...], admin: tuple[str, ...], requests_per_second: float | None) -> None:
    """Prints a new token on stderr, once, and on stdout what the server's settings file is to hold of it: its hash."""
    with needs("making tokens needs the service", "service,cpu"):
        from loopsway.service import TokenSettings
        from loopsway.service.tokens import digest, new_token
    made = new_token()
    try:
        settings = TokenSettings(
            name=name,
            sha256=digest(made),
            read=read or (() if admin else ("*",)),
            admin=admin,
            requests_per_second=requests_per_second,
        )
    except ValueError as error:
        raise click.UsageError(
            f"--name is {name!r}, --requests-per-second {requests_per_second}; expected a name of 1 to 64 letters, "
            "digits or ._@-, and a number above 0"
        ) from error
    click.echo("The token, shown this once; give it to the caller and nobody else:", err=True)
    click.echo(made, err=True)
    click.echo("The server's settings (`loopsway serve --config FILE`) get these lines:", err=True)
    click.echo("[[tokens]]")
    for key, value in settings.model_dump(exclude_defaults=True, exclude_none=True).items():
        click.echo(f"{key} = {json.dumps(value)}")
