"""Times calls side by side in one process, and prints tables.

The machines that benchmarks run on are shared. So what is compared is timed in turns, medians are reported, and the
time is that of the processor, of one thread unless told otherwise: waiting for others does not count. More threads
spend processor time on waiting for each other, so they are timed by the clock on the wall, which needs a quiet machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def median_seconds(
    calls: Mapping[str, Callable[[], Any]], repeats: int, wait: Callable[[], object] | None = None
) -> dict[str, float]:
    """The median duration of each call; one round calls each of them once, and a first round is not counted.

    `wait` ends when what a call left to a device is done: then the time is that of the wall, whatever the threads.
    """
    by_process = wait is None and torch.get_num_threads() == 1
    clock, wait = time.process_time if by_process else time.perf_counter, wait or (lambda: None)
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            wait()
            begin = clock()
            call()
            wait()
            if turn:
                durations[name].append(clock() - begin)
    return {name: statistics.median(values) for name, values in durations.items()}


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def mean_and_deviation(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"
