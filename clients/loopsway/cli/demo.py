"""`loopsway demo`: the whole way, from an untrained model to an answer, in a few minutes on two cores.

Each stage leaves its result in one folder, and is passed over when it is there already.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .build import build_index
from .child import running_server
from .failure import needs
from .query import DRAWN, save_figure
from .tasks import SHORTHANDS
from .train import train_parity

if TYPE_CHECKING:
    from rich.console import Console

    from loopsway.client import Client, Query
    from loopsway.indexer import Index

    from .answers import Answer

SEED, WIDTH, BITS, BATCH_SIZE = 0, 8192, 1, 64
K = 5


@click.command(short_help="Train, build, serve and ask: the whole way, in minutes.")
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    metavar="FOLDER",
    help="Where everything goes.",
)
def demo(folder: Path) -> None:
    """Trains a small looped transformer, indexes its training data, serves the index, and asks it.

    The model reads a string of bits and says whether it has an even or an odd number of ones. What an earlier run left
    in the folder is used again.
    """
    with needs("the demo needs what one machine runs", "all"):
        import_module("loopsway.service")  # what is missing is better missing now than after the training
        from rich.console import Console
    console, started = Console(), time.monotonic()
    run, path, figure = folder / "parity", folder / "parity.index", folder / "trajectory.png"
    with _stage(console, "1. train a looped transformer on parity"):
        _train(str(run))
    with _stage(console, "2. sketch its training strings into an index"):
        index = _build(str(run), str(path))
    with ExitStack() as stack:
        with _stage(console, "3. serve the index in another process"):
            target = f"127.0.0.1:{stack.enter_context(running_server([str(path)], folder))}"
            console.print(f"it answers at {target}")
        _ask(console, target, index, figure)
        with _stage(console, "6. shut the server down"):
            stack.close()
    console.print(f"\nthe demo took {time.monotonic() - started:.1f} s. Go on with:")
    console.print(f"  loopsway inspect {path}\n  loopsway serve --index {path}", highlight=False)


@contextmanager
def _stage(console: Console, title: str) -> Generator[None]:
    started = time.monotonic()
    console.print()
    console.rule(title, align="left", style="dim")
    yield
    console.print(f"{time.monotonic() - started:.1f} s", style="dim", highlight=False)


def _train(run: str) -> None:
    from loopsway.tasks.parity_training import is_trained

    if is_trained(run):
        click.echo(f"{run} is trained already")
    else:
        train_parity(run, SEED)


def _build(run: str, path: str) -> Index:
    index = build_index(
        SHORTHANDS["parity"],
        {"run": run},
        path,
        width=WIDTH,
        bits=BITS,
        seed=SEED,
        batch_size=BATCH_SIZE,
        device="cpu",
    )
    click.echo(f"{path}: {index.num_examples:,} strings x {index.num_steps} steps, {index.size_bytes / 2**20:,.1f} MiB")
    return index


def _ask(console: Console, target: str, index: Index, figure: Path) -> None:
    """Asks for a string that training never saw, and for a training string."""
    from loopsway.client import Client, ExampleQuery, IdQuery

    # Influence is an inner product of gradients: the example with the largest one, and no other, is sure to come first
    # among its own proponents, and a reader can check that.
    known = index.example(int(index.total_norms().argmax()))
    longest = len(index.example(index.num_examples - 1).id)
    alternating = ("01" * longest)[:longest]
    with Client(target) as client:
        with _stage(console, f"4. ask about {alternating}, which training never saw"):
            answer = _shown(console, client, ExampleQuery({"bits": alternating}), alternating)
            save_figure(answer, figure)
            console.print(f"figure: {figure}", highlight=False)
        with _stage(console, f"5. ask about {known.id}, the training string with the largest gradient"):
            _shown(console, client, IdQuery(known.id), f"training string {known.id}")


def _shown(console: Console, client: Client, query: Query, question: str) -> Answer:
    from . import chart, rankings
    from .answers import ask

    answer = ask(client, query, question, k=K, resolve="query_step")
    rankings.show_briefly(answer, console)
    console.print()
    chart.draw(answer.curves(DRAWN), console)
    return answer
