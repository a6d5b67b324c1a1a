"""`loopsway build`: an index of a task's training examples."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

import click

from .failure import in_one_line, needs, stoppable
from .tasks import Command, hf_options, task_options

if TYPE_CHECKING:
    from loopsway.indexer import Index


def sketching_options(command: Command) -> Command:
    """Adds the options of how examples are sketched, whatever they are for; the command gets them as `sketching`."""

    @functools.wraps(command)
    def with_sketching(**options: Any) -> Any:
        sketching = {name: options.pop(name) for name in _SKETCHING_NAMES}
        given = [f"--{name}" for name in ("workers", "address") if sketching[name] is not None]
        if given and sketching["engine"] != "ray":
            raise click.UsageError(f"{', '.join(given)}: for --engine ray alone")
        return command(sketching=sketching, **options)

    decorated: Any = with_sketching
    for option in reversed(_SKETCHING):
        decorated = option(decorated)
    return decorated


_SKETCHING_NAMES = ("batch_size", "device", "nonfinite", "engine", "workers", "address")


_SKETCHING = (
    click.option("--batch-size", default=32, show_default=True, type=click.IntRange(min=1), help="Examples at a time."),
    click.option("--device", default="cpu", show_default=True, help="A torch device."),
    click.option(
        "--nonfinite",
        type=click.Choice(["stop", "skip"]),
        default="stop",
        show_default=True,
        help="What to do with an example whose loss or gradient is not finite.",
    ),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Who sketches: this process, or actors on a Ray cluster.",
    ),
    click.option("--workers", type=click.IntRange(min=1), help="--engine ray: actors.  [default: one a GPU, or CPU]"),
    click.option("--address", help="--engine ray: of the cluster.  [default: RAY_ADDRESS, or one for the build alone]"),
)


@click.command(short_help="Sketch a task's training examples into an index.")
@hf_options
@task_options(required=False, help="path/to/file.py:ClassName, package.module:ClassName, parity or sudoku.")
@click.option("--out", metavar="PATH", required=True, help="The index to make, such as runs/parity.index.")
@click.option("--width", default=8192, show_default=True, help="Floats in a sketch, a power of two.")
@click.option("--bits", default=1, show_default=True, help="Stored bits for each of them: 1, 2, 4, 8, 16 or 32.")
@click.option("--seed", default=0, show_default=True, help="Of every hash.")
@click.option(
    "--optimizer-aware", is_flag=True, help="Influence of a step of Adam, from its second moments at each checkpoint."
)
@click.option("--faiss", metavar="FACTORY", help="Of approximate search, such as 'IVF256,SQ8'.  [default: by the bits]")
@click.option(
    "--recall-floor",
    default=0.99,
    show_default=True,
    help="The least recall@10 of approximate search, measured on held-out rows; below it nothing is published.",
)
@click.option(
    "--recall-queries",
    metavar="FILE.npy",
    type=click.Path(exists=True, dir_okay=False),
    help="Sketches of real queries to measure it on too: float32 [queries, steps, width].",
)
@sketching_options
def build(
    task: str,
    task_arg: dict[str, Any],
    out: str,
    width: int,
    bits: int,
    seed: int,
    optimizer_aware: bool,
    faiss: str | None,
    recall_floor: float,
    recall_queries: str | None,
    sketching: dict[str, Any],
) -> None:
    """Sketches every training example at every step and checkpoint, and writes the index.

    Ctrl-C stops it after the block that is being sketched. Stopped or killed at any moment and run again, it goes on
    where it was. An index that is there already is left as it is.

    What to index is a --task, or a Hugging Face model: --hf with --loop and --data.
    """
    started = time.monotonic()
    index = build_index(
        task,
        task_arg,
        out,
        width=width,
        bits=bits,
        seed=seed,
        optimizer_aware=optimizer_aware,
        faiss=faiss,
        recall_floor=recall_floor,
        recall_queries=recall_queries,
        **sketching,
    )
    click.echo(summary(index, time.monotonic() - started))


def summary(index: Index, seconds: float) -> str:
    """What was built, in a line; what was skipped goes to stderr."""
    if index.num_skipped:
        click.echo(f"skipped for want of a finite loss or gradient: {index.num_skipped:,} examples", err=True)
    return (
        f"{index.path}: {index.num_examples:,} examples x {index.num_steps} steps, "
        f"{index.size_bytes / 2**20:,.1f} MiB, {seconds:.1f} s"
    )


def build_index(
    task: str,
    task_arguments: dict[str, Any],
    out: str,
    *,
    width: int,
    bits: int,
    seed: int,
    optimizer_aware: bool = False,
    recall_queries: str | None = None,
    **sketching: Any,
) -> Index:
    """Loads the task and builds, as `sketching_options` say; ends the process with a message when that fails."""
    with needs("building needs the indexer", "indexer,cpu"):
        from loopsway import indexer
    try:
        config = indexer.SketchConfig(width=width, bits=bits, seed=seed, optimizer_aware=optimizer_aware)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with in_one_line(), needs("building needs the indexer", "indexer,cpu"), stoppable():
        return indexer.build_index(
            indexer.load_task(task, task_arguments),
            out,
            config,
            task_spec=task,
            task_arguments=task_arguments,
            recall_queries=None if recall_queries is None else _read_sketches(recall_queries),
            **sketching,
        )


def _read_sketches(file: str) -> Any:
    import numpy as np

    try:
        return np.load(file, allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{file} can't be read as sketches: {error}; write them with numpy.save") from error
