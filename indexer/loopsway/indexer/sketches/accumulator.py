"""Adds runs of consecutive buckets into sketches: where the time beside the matrix products goes.

B examples, N runs, L floats of a half, W width.

Columns of a hash are contiguous (hashes.py), so each row of a gradient is one run. Runs are added into a buffer of two
halves, of runs to add and of runs to subtract: which half a run goes to is its row's sign, and no sign is multiplied.
A half has W + longest run floats, so that no run wraps around; `drain` folds the tails once and empties the buffer.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .device_hash import RunStarts


class RunAccumulator:
    """Collects runs for one sketch of each example.

    Args:
        batch: B.
        width: W.
        longest: number of entries of the longest run, at most W.
        device: of the sketches.
    """

    def __init__(self, batch: int, width: int, longest: int, *, device: torch.device) -> None:
        self._width, self._half = width, width + longest
        self._buffer = torch.zeros(batch, 2 * self._half, device=device)
        self._scratch = self._buffer.new_empty(0)
        self._has_kernel = device.type == "cuda" and find_spec("triton") is not None

    def add(self, starts: RunStarts, runs: Tensor, examples: slice = slice(None)) -> None:
        """Adds these examples' runs [B, N, n], each to its start: a bucket, plus L to subtract the run."""
        if self._has_kernel:
            from .run_kernel import add_runs  # here: only builds of torch for GPUs bring triton

            add_runs(self._buffer[examples], starts, runs)
        else:
            _add_runs(self._buffer[examples], starts.starts, runs)

    def scratch(self, least: int) -> Tensor:
        """Memory for runs before they are added, kept from one call to the next: fresh pages cost as much as adding."""
        least = max(least, self._half - self._width)
        if len(self._scratch) < least:
            self._scratch = self._buffer.new_empty(least)
        return self._scratch

    def add_apart(self, starts: Tensor, runs: Tensor) -> None:
        """As `add`, with starts [B, N] of each example's own."""
        batch, size = self._buffer.shape
        starts = starts + size * torch.arange(batch, device=starts.device).unsqueeze(1)
        _add_runs(self._buffer.view(1, -1), starts.flatten(), runs.reshape(1, -1, runs.shape[2]))

    def drain(self, out: Tensor) -> None:
        """Adds what was collected to the sketches [B, W], and begins anew."""
        net = self._buffer[:, : self._half] - self._buffer[:, self._half :]
        out += net[:, : self._width]
        out[:, : self._half - self._width] += net[:, self._width :]
        self._buffer.zero_()


def _add_runs(buffer: Tensor, starts: Tensor, runs: Tensor) -> None:
    """Adds the runs [A, N, n] to the floats of buffer [A, M] that begin at starts [N]."""
    length = runs.shape[2]
    if buffer.device.type == "cpu" and _overlapping_views_add_up():
        buffer.unfold(1, length, 1).index_add_(1, starts, runs)
    else:
        index = starts.unsqueeze(1) + torch.arange(length, device=starts.device)
        buffer.index_add_(1, index.flatten(), runs.flatten(1))


@cache
def _overlapping_views_add_up() -> bool:
    """Whether index_add_ through a view whose slices overlap adds whole slices one after another.

    It does so on CPUs in the releases of torch that are tested, three to four times as fast as by entries, but torch
    does not promise it: tried once in each process, at sizes at which torch would use its threads, with whole numbers,
    so that any order of adding gives the same bits.
    """
    for batch, rows, length, span in ((1, 500, 96, 200), (4, 100, 512, 1000), (32, 12, 2048, 3000)):
        starts = torch.arange(rows) * 7919 % (span - length)
        runs = (torch.arange(batch * rows * length) % 251 - 125).float().view(batch, rows, length)
        fast, slow = torch.zeros(batch, span), torch.zeros(batch, span)
        fast.unfold(1, length, 1).index_add_(1, starts, runs)
        for run, start in enumerate(starts.tolist()):
            slow[:, start : start + length] += runs[:, run]
        if not torch.equal(fast, slow):
            return False
    return True
