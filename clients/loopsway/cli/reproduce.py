"""`loopsway reproduce`: the paper's experiments, each one command."""

from __future__ import annotations

from pathlib import Path

import click

from .failure import in_one_line, needs, stoppable

NAMES = ("fig1", "fig2", "fig3", "fig4", "scale")


@click.command(short_help="Run an experiment of the paper.")
@click.argument("name", type=click.Choice(NAMES))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Takes data, figure and claims.  [default: runs/reproduce/NAME]",
)
@click.option("--full", is_flag=True, help="The large setting, for a GPU.  [default: minutes on a CPU]")
@click.option("--device", default="cpu", show_default=True, help="A torch device, to sketch on.")
def reproduce(name: str, out: Path | None, full: bool, device: str) -> None:
    """Runs an experiment of the paper, and writes its data (Parquet), figure (PNG, SVG) and claims (JSON).

    fig1: a looped transformer that tells parity, loop by loop, on an alternating string.

    fig2: a looped transformer that solves Sudoku, with more loops than in training, by difficulty.

    fig3: where in the loop influence is, and of which sign, on GSM8K, by the number of loops. LOOPSWAY_GSM8K names the
    folder of its files.

    fig4: error of influences against width, ours and the reference's, with the theory.

    scale: time, memory and error on the paper's shape as the model grows, beside the reference, sketched and exact.

    A training and an index that the folder has already are used again.
    """
    folder = out or Path("runs/reproduce") / name
    with in_one_line(), needs("experiments need their own extra", "experiments,cpu"), stoppable():
        from loopsway.experiments.reproduction import reproduce

        findings = reproduce(name, folder, size="full" if full else "small", device=device)
    for claim in findings.claims:
        verdict = {True: "agrees", False: "DISAGREES", None: "seen"}[claim.agrees]
        click.echo(f"{verdict}: {claim.claim}: {claim.seen}")
    click.echo(f"{folder}: data.parquet, figure.png, figure.svg, claims.json")
