"""`loopsway serve`: answers for one or several indices over gRPC."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .failure import in_one_line, needs
from .tasks import task_options


@click.command(short_help="Serve indices over gRPC.")
@click.option(
    "--index",
    "indices",
    multiple=True,
    required=True,
    metavar="[NAME=]PATH",
    help="An index, called NAME by requests, or as its folder; may be repeated.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=50051, show_default=True, help="0 picks a free one.")
@task_options(required=False, help="The indices' task, where they name none that ships with Loopsway.")
@click.option("--no-model", is_flag=True, help="Run no task: answer queries given as sketches alone.")
@click.option("--device", default="cpu", show_default=True, help="A torch device for model and searches.")
@click.option("--insecure-bind", is_flag=True, help="Allow a --host that others reach, without TLS or passwords.")
@click.option(
    "--ready-file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help='Written once the server answers: JSON with "port" and "pid"; removed at the end.',
)
def serve(
    indices: tuple[str, ...],
    host: str,
    port: int,
    task: str | None,
    task_arg: dict[str, Any],
    no_model: bool,
    device: str,
    insecure_bind: bool,
    ready_file: Path | None,
) -> None:
    """Serves indices until Ctrl-C or SIGTERM, then lets running requests finish.

    The task that an index names runs only when it is one of Loopsway's own, or is named with --task.
    """
    with needs("serving needs the service", "service,cpu"):
        from loopsway import service
    try:
        settings = service.Settings(host=host, port=port, insecure_bind=insecure_bind)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with in_one_line(), needs("serving needs the service", "service,cpu"):
        sources = [
            service.Source(
                name=name,
                path=path,
                task_spec=task,
                task_arguments=task_arg or None,
                model=not no_model,
                device=device,
            )
            for name, path in map(_named, indices)
        ]
        service.serve(sources, settings, ready_file=ready_file)


def _named(index: str) -> tuple[str | None, str]:
    """NAME=PATH, or a path alone, which may have an "=" in a folder's name."""
    name, is_named, path = index.partition("=")
    return (name, path) if is_named and name and "/" not in name else (None, index)
