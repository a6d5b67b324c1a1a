"""The options that name a set of queries, and how it is read: examples as JSON, indexed examples, or sketches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .tasks import Command, task_options

if TYPE_CHECKING:
    from loopsway.indexer import Index, QuerySet

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

_OPTIONS = (
    click.option("--queries", type=FILE, metavar="FILE.jsonl", help="An example on each line, in the task's JSON."),
    click.option("--ids", metavar="ID[,ID...]", help="Indexed examples."),
    click.option("--ids-file", type=FILE, metavar="FILE", help="Indexed examples, an id on each line."),
    click.option("--sketches", type=FILE, metavar="FILE.npy", help="[queries, steps, width], with --fingerprint."),
    click.option("--fingerprint", metavar="HEX", help="Of the sketcher that made the sketches."),
    task_options(required=False, help="The index's task, where it names none that ships with Loopsway."),
    click.option("--device", default="cpu", show_default=True, help="A torch device for the model."),
    click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Queries at a time."),
)
_NAMES = ("queries", "ids", "ids_file", "sketches", "fingerprint", "task", "task_arg", "device", "batch_size")
TOGETHER = "--sketches and --fingerprint go together: only sketches of one construction compare"
_KINDS = ("queries", "ids", "ids_file", "sketches")


def query_set_options(command: Command) -> Command:
    """Adds the options; the command gets what they say as `asked`."""

    @functools.wraps(command)
    def with_queries(**options: Any) -> Any:
        asked = {name: options.pop(name) for name in _NAMES}
        if (asked["sketches"] is None) != (asked["fingerprint"] is None):
            raise click.UsageError(TOGETHER)
        return command(asked=asked, **options)

    decorated: Any = with_queries
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def named(asked: dict[str, Any]) -> list[str]:
    """The kinds of queries that were named, as options."""
    return [f"--{kind.replace('_', '-')}" for kind in _KINDS if asked[kind] is not None]


def read_query_set(index: Index, asked: dict[str, Any]) -> QuerySet:
    """The queries that the options name, exactly one kind of them."""
    from loopsway.indexer import ExampleQueries, SketchedQueries, load_sketcher

    if len(named(asked)) != 1:
        raise click.UsageError(
            "name the queries by one of --queries FILE.jsonl, --ids, --ids-file and --sketches FILE.npy"
        )
    if asked["sketches"] is not None:
        if asked["fingerprint"] != index.fingerprint:
            raise click.UsageError(
                f"the sketches are of fingerprint {asked['fingerprint']}, {index.path} holds {index.fingerprint}: "
                "sketch the queries with the index's task and configuration"
            )
        return SketchedQueries(asked["sketches"], index.width)
    task, sketcher = load_sketcher(
        index, asked["task"], asked["task_arg"] or None, device=asked["device"], batch_size=asked["batch_size"]
    )
    if asked["queries"] is not None:
        return ExampleQueries.from_jsonl(asked["queries"], task, sketcher)
    ids = asked["ids"].split(",") if asked["ids"] is not None else asked["ids_file"].read_text("utf-8").splitlines()
    return ExampleQueries.from_ids(ids, index, task, sketcher)
