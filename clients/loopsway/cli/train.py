"""`loopsway train`: trains the models of the tasks that ship."""

from __future__ import annotations

import sys

import click

from .failure import INTERRUPTED, in_one_line, needs


@click.group(short_help="Train a model that ships with Loopsway.")
def train() -> None:
    """Trains a model that ships with Loopsway, and keeps its checkpoints."""


@train.command()
@click.option("--run", default="runs/parity", show_default=True, metavar="FOLDER", help="Where the checkpoints go.")
@click.option("--seed", default=0, show_default=True, help="Of the weights and the batches.")
def parity(run: str, seed: int) -> None:
    """Trains a small looped transformer to tell whether a string of bits has an even or an odd number of ones.

    What an earlier training left in the folder is replaced.
    """
    train_parity(run, seed)


def train_parity(run: str, seed: int) -> None:
    """Trains and says what was reached; ends the process with a message when it fails or is interrupted."""
    try:
        with in_one_line(), needs("training needs the indexer", "indexer,cpu"):
            from loopsway.tasks.parity_training import train

            report = train(run, seed=seed)
    except KeyboardInterrupt:
        click.echo("\ninterrupted; nothing of this training is kept, and the same command begins it anew", err=True)
        sys.exit(INTERRUPTED)
    click.echo(
        f"{run}: {len(report.checkpoints)} checkpoints of {report.model['num_loops']} loops, "
        f"{report.overall_held_out_accuracy:.1%} right on strings that training never saw, {report.seconds:.1f} s"
    )
