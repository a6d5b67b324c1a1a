"""`loopsway add`, `delete`, `compact` and `prune`: what becomes of an index after it was built."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from .build import sketching_options, summary
from .failure import in_one_line, needs, stoppable
from .tasks import hf_options, task_options

NEEDED = ("changing an index needs the indexer", "indexer,cpu")


@click.command(short_help="Add examples to an index.")
@click.argument("path")
@hf_options
@task_options(required=False, help="As of `build`: the same model and checkpoints, and the examples to add.")
@click.option("--skip-existing", is_flag=True, help="Leave out examples whose ids the index has: of a file that grew.")
@sketching_options
def add(path: str, task: str, task_arg: dict[str, Any], skip_existing: bool, sketching: dict[str, Any]) -> None:
    """Adds a task's examples to the index at PATH, as its next generation.

    Nothing that is there is rewritten. Stopped or killed and run again, it goes on where it was.
    """
    started = time.monotonic()
    with in_one_line(), needs(*NEEDED), stoppable():
        from loopsway.indexer import add_examples, load_task

        index = add_examples(
            load_task(task, task_arg),
            path,
            skip_existing=skip_existing,
            task_spec=task,
            task_arguments=task_arg,
            **sketching,
        )
    click.echo(summary(index, time.monotonic() - started))


@click.command(short_help="Delete examples from an index.")
@click.argument("path")
@click.option("--ids", metavar="ID[,ID...]", help="Of the examples.")
@click.option("--ids-file", type=click.Path(exists=True, dir_okay=False), help="A file with an id on each line.")
@click.option("--where", metavar="FILTER", help="Over metadata, such as 'source == \"web\" and length < 200'.")
def delete(path: str, ids: str | None, ids_file: str | None, where: str | None) -> None:
    """Deletes examples from the index at PATH: no search finds them from now on.

    Their bytes stay until `loopsway compact`, and for readers of earlier generations until `loopsway prune`.
    """
    if sum(each is not None for each in (ids, ids_file, where)) != 1:
        raise click.UsageError("name the examples by one of --ids, --ids-file and --where")
    chosen = ids.split(",") if ids is not None else None
    if ids_file is not None:
        chosen = Path(ids_file).read_text(encoding="utf-8").splitlines()
    with in_one_line(), needs(*NEEDED):
        from loopsway.indexer import delete_examples

        count = delete_examples(path, ids=chosen, where=where)
    click.echo(f"{path}: deleted {count:,} examples")


@click.command(short_help="Rewrite an index without its deleted examples.")
@click.argument("path")
def compact(path: str) -> None:
    """Rewrites the index at PATH as one part, without its deleted and skipped examples."""
    started = time.monotonic()
    with in_one_line(), needs(*NEEDED), stoppable():
        from loopsway.indexer import compact_index

        index = compact_index(path)
    click.echo(summary(index, time.monotonic() - started))


@click.command(short_help="Remove earlier generations of an index.")
@click.argument("path")
@click.option("--keep", default=1, show_default=True, type=click.IntRange(min=1), help="Last generations that stay.")
def prune(path: str, keep: int) -> None:
    """Removes earlier generations of the index at PATH, and what was begun and never finished.

    Close what has an earlier generation open before: it may fail.
    """
    with in_one_line(), needs(*NEEDED):
        from loopsway.indexer import prune_index

        pruned = prune_index(path, keep=keep)
    numbers = ", ".join(map(str, pruned.generations)) or "none"
    click.echo(
        f"{path}: removed generations {numbers}; {len(pruned.parts)} parts, {pruned.size_bytes / 2**20:,.1f} MiB"
    )
