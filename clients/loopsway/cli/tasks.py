"""The options that name a task, and how their text is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

SHORTHANDS = {"parity": "loopsway.tasks.parity:ParityTask"}


def task_options(*, required: bool, help: str) -> Callable[[Command], Command]:
    """Adds `--task` and `--task-arg`, read into the parameters `task` (a full spec) and `task_arg` (a dict)."""

    def decorate(command: Command) -> Command:
        with_arguments = click.option(
            "--task-arg",
            metavar="KEY=VALUE",
            multiple=True,
            callback=_arguments,
            help="An argument of the task's constructor, as often as needed; VALUE is read as JSON, else as text.",
        )(command)
        return click.option("--task", metavar="SPEC", required=required, callback=_spec, help=help)(with_arguments)

    return decorate


def _spec(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    return None if value is None else SHORTHANDS.get(value, value)


def _arguments(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key.isidentifier():
            raise click.BadParameter(f"{value!r} is not KEY=VALUE with KEY a Python name, such as run=runs/parity")
        arguments[key] = read(text)
    return arguments


def read(text: str) -> Any:
    """The text's value as JSON, or the text itself where it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
