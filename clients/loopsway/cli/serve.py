"""`loopsway serve`: answers for one or several indices over gRPC."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .failure import in_one_line, needs
from .tasks import task_options

if TYPE_CHECKING:
    from loopsway.service import Settings


@click.command(short_help="Serve indices over gRPC.")
@click.option(
    "--config", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="TOML with any of the settings."
)
@click.option("--check-config", is_flag=True, help="Check the settings and all files they name, and serve nothing.")
@click.option("--index", "indices", multiple=True, metavar="[NAME=]PATH", help="An index; may be repeated.")
@click.option("--host", help="The address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=int, help="0 picks a free one.  [default: 50051]")
@task_options(required=False, help="The indices' task, where they name none that ships with Loopsway.")
@click.option("--no-model", is_flag=True, help="Run no task: answer queries given as sketches alone.")
@click.option("--device", help="A torch device for model and searches.  [default: cpu]")
@click.option("--tls-certificate", metavar="FILE", help="Speak TLS with this certificate.")
@click.option("--tls-key", metavar="FILE", help="The certificate's key.")
@click.option("--tls-client-ca", metavar="FILE", help="Callers must show a certificate that this one signed.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    help="Who reads the codes: this process, or actors on a Ray cluster.  [default: local]",
)
@click.option("--workers", type=click.IntRange(min=1), help="--engine ray: shards.  [default: one a GPU, or node]")
@click.option("--address", help="--engine ray: of the cluster.  [default: RAY_ADDRESS, or one that is started]")
@click.option(
    "--insecure-bind", is_flag=True, default=None, help="Allow a --host that others reach, without TLS or tokens."
)
@click.option(
    "--ready-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help='Written once the server answers: JSON with "port" and "pid"; removed at the end.',
)
def serve(
    config: Path | None,
    check_config: bool,
    indices: tuple[str, ...],
    task: str | None,
    task_arg: dict[str, Any],
    no_model: bool,
    device: str | None,
    engine: str | None,
    workers: int | None,
    address: str | None,
    ready_file: Path | None,
    **flags: Any,
) -> None:
    """Serves indices until Ctrl-C or SIGTERM, then lets running requests finish.

    The task that an index names runs only when it is one of Loopsway's own, or is named with --task.

    Every setting can be given in the --config file, or in a variable LOOPSWAY_NAME, which goes before the file; flags
    go before both.
    """
    with needs("serving needs the service", "service,cpu"):
        from loopsway import service
    of_reading = {"device": device, "engine": engine, "workers": workers, "address": address}
    of_index = {"task": task, "task_arguments": task_arg or None, "model": False if no_model else None}
    given = {name: value for name, value in {**of_index, **of_reading}.items() if value is not None}
    by_flags = _given(flags, indices)

    def read() -> Settings:
        return service.read_settings(by_flags, file=config).with_index_settings(given)

    try:
        settings = read()
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error
    if not settings.indices:
        raise click.UsageError("no index to serve: give --index PATH, or `indices` in a --config file")
    if check_config:
        _check(settings)
        return
    with in_one_line(), needs("serving needs the service", "service,cpu"):
        service.serve(settings, ready_file=ready_file, reread=read)


def _given(flags: dict[str, Any], indices: tuple[str, ...]) -> dict[str, Any]:
    """The settings that flags give."""
    tls = {
        name: value for name in ("certificate", "key", "client_ca") if (value := flags.pop(f"tls_{name}")) is not None
    }
    flags["tls"] = tls or None
    return {name: value for name, value in {**flags, "indices": indices or None}.items() if value is not None}


def _check(settings: Settings) -> None:
    from loopsway import service

    try:
        lines = service.check_settings(settings)
    except (ValueError, OSError, LookupError, ImportError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    for line in lines:
        click.echo(line)
    click.echo("the settings are good")
