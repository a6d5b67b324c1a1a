"""The options that name a task, and how their text is read: any task, or a Hugging Face model in few words."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

SHORTHANDS = {"parity": "loopsway.tasks.parity:ParityTask", "sudoku": "loopsway.tasks.sudoku:SudokuTask"}
CAUSAL_LM = "loopsway.tasks.causal_lm:CausalLMTask"

# The options that go with --hf, by the argument of CausalLMTask that each gives.
HF_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "data": click.option("--data", metavar="FILE", help='--hf: JSONL with "prompt" and "completion", or "text".'),
    "loop": click.option("--loop", metavar="NAMES", help="--hf: the looped layers, such as 'model.layers.8-27'."),
    "outside": click.option(
        "--outside", is_flag=True, default=None, help="--hf: attribute to what is outside the loop too."
    ),
    "answer_only": click.option(
        "--answer-only/--all-tokens", default=None, help="--hf: the completion's tokens count (default), or all."
    ),
    "learning_rate": click.option(
        "--learning-rate", metavar="X[,Y...]", help="--hf: instead of what the Trainer recorded."
    ),
    "max_length": click.option(
        "--max-length", type=click.IntRange(min=2), help="--hf: tokens that are read of a text.  [default: 512]"
    ),
}


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


def hf_options(command: Command) -> Command:
    """Adds `--hf` and what goes with it: the command gets the `task` and `task_arg` that these stand for.

    Stands above `task_options(required=False)`: one of the two names the task.
    """

    @functools.wraps(command)
    def with_task(*, hf: tuple[str, ...], task: str | None, task_arg: dict[str, Any], **options: Any) -> Any:
        given = {name: value for name in HF_OPTIONS if (value := options.pop(name)) is not None}
        if (task is None) == (not hf):
            raise click.UsageError("name what to index: either --task SPEC or --hf FOLDER")
        if hf:
            task, task_arg = CAUSAL_LM, _hf_arguments(hf, given, task_arg)
        elif given:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise click.UsageError(f"{flags}: for --hf alone; a --task takes its arguments as --task-arg KEY=VALUE")
        return command(task=task, task_arg=task_arg, **options)

    decorated: Any = with_task
    for option in reversed(HF_OPTIONS.values()):
        decorated = option(decorated)
    folders = click.option(
        "--hf",
        metavar="FOLDER",
        multiple=True,
        help="A Hugging Face causal language model, or the Trainer's run, or one checkpoint after the other.",
    )
    return folders(decorated)


def _hf_arguments(hf: tuple[str, ...], given: dict[str, Any], task_arg: dict[str, Any]) -> dict[str, Any]:
    arguments = {"model": hf[0] if len(hf) == 1 else list(hf), **given}
    if isinstance(rate := arguments.get("learning_rate"), str):
        arguments["learning_rate"] = read(rate)
    if twice := sorted(set(arguments) & set(task_arg)):
        raise click.UsageError(f"{', '.join(twice)}: given by --task-arg and by an option of its own; drop one")
    return {**arguments, **task_arg}


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
