"""How a command fails: one line on stderr and exit code 1 where the error is ours, else a traceback."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from types import TracebackType

import click

INTERRUPTED = 130  # the exit code that shells report for a process that Ctrl-C ended

# The top-level modules that extras bring.
BROUGHT_BY_EXTRAS = (
    *("torch", "zarr", "safetensors", "pyarrow", "faiss"),
    *("google", "grpc_health", "grpc_reflection", "grpc_status", "prometheus_client", "pydantic", "pydantic_settings"),
    *("rich", "matplotlib", "plotext", "ray", "scipy", "sdi"),
    *("starlette", "uvicorn", "plotly"),
)


@contextmanager
def needs(what: str, extras: str) -> Generator[None]:
    """Turns a missing module of an extra into the line that says how to install it.

    Args:
        what: the sentence's beginning, such as "building needs the indexer".
        extras: the extras to install, such as "indexer,cpu".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in BROUGHT_BY_EXTRAS:
            raise
        raise click.ClickException(f"{what}: pip install 'loopsway[{extras}]'") from error


@contextmanager
def stoppable() -> Generator[None]:
    """Ends the process with a message and a shell's exit code when the indexer's work in it was stopped by a signal."""
    from loopsway.indexer import StoppedError

    try:
        yield
    except StoppedError as stopped:
        click.echo(str(stopped), err=True)
        sys.exit(128 + stopped.signal)
    except KeyboardInterrupt:
        click.echo("\ninterrupted; what is done is kept, and the same command goes on where it was", err=True)
        sys.exit(INTERRUPTED)


@contextmanager
def in_one_line() -> Generator[None]:
    """Turns an error that Loopsway itself raised, or the system's OSError, into one line.

    Whatever a task's own code or a library raises keeps its traceback: whoever wrote the task needs it.
    """
    try:
        yield
    except OSError as error:
        raise click.ClickException(_text(error)) from error
    except (ValueError, LookupError, ImportError, RuntimeError) as error:
        if not _is_ours(error.__traceback__):
            raise
        raise click.ClickException(_text(error)) from error


def _is_ours(traceback: TracebackType | None) -> bool:
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    name = str(traceback.tb_frame.f_globals.get("__name__", ""))
    return name.startswith("loopsway.")


def _text(error: Exception) -> str:
    # str() of a KeyError is the repr of its message.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.errno is not None and error.strerror is not None:
        text = error.strerror if error.filename is None else str(error)
    return "; ".join([text, *getattr(error, "__notes__", ())])
