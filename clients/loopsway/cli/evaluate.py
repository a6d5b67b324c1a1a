"""`loopsway evaluate`: do influences predict what retraining does?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .failure import in_one_line, needs, stoppable

if TYPE_CHECKING:
    from loopsway.experiments.evaluation.evaluation import Result

SUBJECTS = ("parity", "text")


@click.command(short_help="Test influences by retraining.")
@click.argument("subject", type=click.Choice(SUBJECTS))
@click.option("--subsets", default=40, show_default=True, help="Random halves to retrain on, for each seed.")
@click.option("--seeds", default=5, show_default=True, help="Of the training.")
@click.option("--removals", default=4, show_default=True, help="Queries whose strongest proponents are removed.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Takes results, a figure, and trainings, which are used again.  [default: runs/evaluate/SUBJECT]",
)
@click.option(
    "--bergson-python",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="LOOPSWAY_BERGSON_PYTHON",
    help="A Python that has bergson, which then predicts too.  [env: LOOPSWAY_BERGSON_PYTHON]",
)
@click.option("--magic", is_flag=True, help="Have bergson differentiate through the training too: minutes a seed.")
@click.option("--tiny", is_flag=True, help="A model that learns nothing, to see that it runs.")
def evaluate(
    subject: str,
    subsets: int,
    seeds: int,
    removals: int,
    out: Path | None,
    bergson_python: Path | None,
    magic: bool,
    tiny: bool,
) -> None:
    """Retrains a small looped model and compares what happens with what each method's influences predict.

    Datamodelling score: do they rank the losses of models trained on random halves? Detection area: does self-influence
    find flipped labels? Removal: does a query's loss rise without its strongest proponents?

    Methods: TracIn of the index, in total and at single steps, of the whole model, optimizer-aware, cosine; the
    reference package with exact gradients; losses; a draw; and bergson, where --bergson-python names a Python with it.

    SUBJECT is parity, or text: GSM8K's questions where LOOPSWAY_GSM8K names their folder, else sums in words. A run
    that was stopped goes on where it was.
    """
    folder = out or Path("runs/evaluate") / subject
    if magic and bergson_python is None:
        raise click.UsageError("--magic is bergson's; --bergson-python names a Python that has it")
    with in_one_line(), needs("evaluations need their own extra", "experiments,cpu"), stoppable():
        from rich.console import Console
        from rich.progress import Progress

        from loopsway.experiments.evaluation.evaluation import Amount, evaluate
        from loopsway.experiments.evaluation.peer import WITHOUT_BERGSON, Bergson
        from loopsway.experiments.evaluation.predictions import BERGSON, EXACT
        from loopsway.experiments.evaluation.predictors import WITHOUT_REFERENCE
        from loopsway.experiments.evaluation.report import FILES, write_report
        from loopsway.experiments.evaluation.subjects import make_subject

        chosen = make_subject(subject, tiny=tiny)
        amount = Amount(num_subsets=subsets, seeds=tuple(range(seeds)), num_removal_queries=removals)
        bergson = None
        if bergson_python is not None:
            bergson = Bergson(python=bergson_python, subject=subject, tiny=tiny, magic=magic)
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task(f"retraining {chosen.name}", total=amount.num_trainings())
            results = evaluate(chosen, folder / "work", amount, lambda: bar.advance(task), bergson)
            bar.update(task, completed=amount.num_trainings())  # methods that are left out count as done
        write_report(chosen, amount, results, folder)
    _show(results)
    methods = {result.method for result in results}
    for method, why in {EXACT: WITHOUT_REFERENCE, BERGSON: WITHOUT_BERGSON}.items():
        if method not in methods:
            click.echo(why)
    click.echo(f"{folder}: {', '.join(FILES)}")


def _show(results: list[Result]) -> None:
    from rich.console import Console

    from .tables import listing

    for test in dict.fromkeys(result.test for result in results):
        table = listing(["method", "mean", "95 % interval"], title=test, text=["method"])
        for result in results:
            if result.test == test:
                table.add_row(result.method, f"{result.interval.mean:+.3f}", _range(result))
        Console().print(table)


def _range(result: Result) -> str:
    low, high = result.interval.low, result.interval.high
    return "one seed" if math.isnan(low) else f"{low:+.3f} to {high:+.3f}"
