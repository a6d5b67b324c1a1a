"""`loopsway query`: asks a running server which training examples shaped an answer, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from .connection import Connection, connection_options
from .failure import needs

if TYPE_CHECKING:
    from loopsway.client import Query

    from .answers import Answer, Resolve

RESOLVE = ("query-step", "train-step", "same-step")
DRAWN = 3  # proponents, and as many opponents, in the chart and the figure


@click.command(short_help="Ask a server which training examples shaped an answer.")
@connection_options
@click.option("--index", default="", metavar="NAME", help="Which of its indices, when it serves several.")
@click.option("--example", metavar="JSON", help="Ask about an example, in the JSON that the index's task reads.")
@click.option("--id", "example_id", metavar="ID", help="Ask about a training example, by its id.")
@click.option(
    "--sketch",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE.npy",
    help="Ask about a sketch of your own: [steps, width], with --fingerprint.",
)
@click.option("--fingerprint", metavar="HEX", help="Of the sketcher that made the sketch.")
@click.option("--k", default=5, show_default=True, help="Proponents, and opponents, in each table.")
@click.option("--proponents", "num_proponents", type=int, metavar="N", help="Proponents in each table, instead of --k.")
@click.option("--opponents", "num_opponents", type=int, metavar="N", help="Opponents in each table, instead of --k.")
@click.option(
    "--resolve",
    type=click.Choice(RESOLVE),
    default="query-step",
    show_default=True,
    help="Whose steps: the query's, the training example's, or the same of both.",
)
@click.option("--step", "steps", type=int, multiple=True, metavar="N", help="Only this step; may be repeated.")
@click.option(
    "--where",
    default="",
    metavar="FILTER",
    help="Rank only some examples, such as 'source == \"web\" and length < 200'.",
)
@click.option("--approximate", is_flag=True, help="Search the index's FAISS files instead of every stored code.")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds to wait for each answer.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, and nothing else.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Save the trajectories as a figure: .png, .svg or .pdf.",
)
def query(
    connection: Connection,
    index: str,
    example: str | None,
    example_id: str | None,
    sketch: Path | None,
    fingerprint: str | None,
    k: int,
    num_proponents: int | None,
    num_opponents: int | None,
    resolve: str,
    steps: tuple[int, ...],
    where: str,
    approximate: bool,
    timeout_s: float,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Shows which training examples pushed an answer up or down, at each pass through the loop.

    Ask about one of --example, --id or --sketch. Proponents lowered the query's loss, opponents raised it.
    """
    from loopsway.client import LoopswayError

    from .answers import ask

    asked, question = _asked(example, example_id, sketch, fingerprint)
    if plot is not None:
        check_format(plot)
    try:
        with connection.client(timeout_s) as client:
            answer = ask(
                client,
                asked,
                question,
                k=k,
                num_proponents=num_proponents,
                num_opponents=num_opponents,
                resolve=cast("Resolve", resolve.replace("-", "_")),
                steps=steps or None,
                where=where,
                exact=not approximate,
                index=index,
            )
    except LoopswayError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(answer.to_json(), indent=2))
    else:
        show(answer)
    if plot is not None:
        save_figure(answer, plot)
        click.echo(f"figure: {plot}", err=as_json)


def show(answer: Answer) -> None:
    """Prints the tables of every step and the chart."""
    with needs("printing tables needs the command's extra", "cli"):
        from rich.console import Console

        from . import chart, rankings

        console = Console()
        rankings.show(answer, console)
        console.print()
        chart.draw(answer.curves(DRAWN), console)


def check_format(path: Path) -> None:
    from .figure import FORMATS

    if path.suffix.lower() not in FORMATS:
        raise click.UsageError(f"--plot {path} has no known format; end it with {', '.join(FORMATS)}")


def save_figure(answer: Answer, path: Path) -> None:
    """Draws the trajectories to a file."""
    from . import figure

    with needs("drawing a figure needs matplotlib", "cli"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.save(answer.curves(DRAWN), path)
        except OSError as error:
            raise click.ClickException(f"the figure can't be written: {error}") from error


def _asked(
    example: str | None, example_id: str | None, sketch: Path | None, fingerprint: str | None
) -> tuple[Query, str]:
    from loopsway.client import ExampleQuery, IdQuery, SketchQuery

    if sum(given is not None for given in (example, example_id, sketch)) != 1:
        raise click.UsageError("ask about one thing: give one of --example JSON, --id ID or --sketch FILE.npy")
    if (sketch is None) != (fingerprint is None):
        raise click.UsageError("--sketch and --fingerprint go together: only sketches of one construction compare")
    if example is not None:
        return ExampleQuery(json_value(example, "--example")), example
    if example_id is not None:
        return IdQuery(example_id), f"training example {example_id}"
    assert sketch is not None
    assert fingerprint is not None
    return SketchQuery(npy_array(sketch, "--sketch"), fingerprint), sketch.name


def json_value(text: str, where: str) -> Any:
    """What the JSON stands for; a usage error names `where` it is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise click.UsageError(f"{where} {text!r} is not JSON ({error}); quote it for the shell: '...'") from error


def npy_array(path: Path, where: str) -> Any:
    """The array in a .npy file; a usage error names `where` it is given."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise click.UsageError(f"{where} {path} is not a .npy file of numbers: {error}") from error
