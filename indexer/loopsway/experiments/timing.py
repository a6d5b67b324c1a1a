"""Times calls side by side in one process.

Machines are shared. So what is compared is timed in turns, medians are reported, and the time is that of the processor
where torch runs on one thread: waiting for others does not count. More threads spend processor time on waiting for each
other, so they are timed by the clock on the wall, which needs a quiet machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


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
