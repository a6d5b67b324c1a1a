"""What benchmark programs take on the command line, and tables; loopsway.experiments.timing times calls."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence

import torch


def parse_arguments(parser: argparse.ArgumentParser, *, threads: int = 1) -> argparse.Namespace:
    """Adds what every benchmark program takes, parses, and sets the number of threads (by default `threads`)."""
    parser.add_argument("--smoke", action="store_true", help="a run of seconds whose figures mean nothing")
    parser.add_argument(
        "--threads", type=int, default=threads, help=f"of torch; more than one: time by the wall (default: {threads})"
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each timing (default: 7)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.smoke:
        arguments.repeats = 1
    return arguments


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def mean_and_deviation(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"
