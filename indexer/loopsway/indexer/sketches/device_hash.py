"""A parameter's hash as tensors on the device of its gradients.

B examples, T tokens, I inputs (columns), O outputs (rows), W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from .hashes import ParameterHash, parameter_hash

TILE = 256  # floats that a program of run_kernel.py owns


class RunStarts:
    """Where runs start in a `RunAccumulator`, signs included; and, for a GPU, which of them reach a tile of it.

    Args:
        starts: int64 [N].
    """

    def __init__(self, starts: Tensor) -> None:
        self.starts = starts
        self._bounds: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.starts)

    def part(self, runs: slice, offset: int = 0) -> RunStarts:
        """Of some runs, from their entry `offset` on."""
        if offset == 0 and len(range(*runs.indices(len(self)))) == len(self):
            return self  # with what was found out of them
        return RunStarts(self.starts[runs] + offset)

    @property
    def order(self) -> Tensor:
        """Numbers of the runs by their start, int32 [N]."""
        return self._sorted[1]

    @property
    def in_order(self) -> Tensor:
        """The starts in that order, int32 [N]."""
        return self._sorted[0]

    def bounds(self, length: int, size: int) -> Tensor:
        """Of runs of that length, in order, the first that reaches each tile of a buffer, and the first after it.

        Returns:
            int32 [tiles, 2].
        """
        if (length, size) not in self._bounds:
            tiles = torch.arange(0, size, TILE, device=self.starts.device, dtype=torch.int32)
            first = torch.searchsorted(self.in_order, tiles - length, right=True)
            after = torch.searchsorted(self.in_order, tiles + TILE)
            self._bounds[length, size] = torch.stack([first, after], dim=1).int()
        return self._bounds[length, size]

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        starts, order = self.starts.sort(stable=True)
        return starts.int(), order.int()


class DeviceHash:
    """Where a parameter's entries go, entry by entry and run by run.

    Args:
        hashed: the hash.
        device: of the tensors.
        longest_run: entries of the longest run of any parameter that is sketched beside this one, at most W.

    Attributes:
        shape: (O, I); a vector is one row.
        rows: int64 [O] buckets. row_signs: [O].
        columns: int64 [I] buckets. column_signs: [I].
        segments: slices of the columns that a row's runs are of, W columns each but the last.
        starts: for each segment, where the rows' runs start.
    """

    @classmethod
    def of_parameters(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        width: int,
        seed: int,
        checkpoint: str,
        device: torch.device,
    ) -> dict[str, DeviceHash]:
        """The hashes of parameters of these shapes, by name; `checkpoint` is part of their key."""
        hashes = {name: parameter_hash(seed, checkpoint, name, shape, width) for name, shape in shapes.items()}
        longest_run = max((min(width, len(hashed.column_buckets)) for hashed in hashes.values()), default=0)
        return {name: cls(hashed, device, longest_run) for name, hashed in hashes.items()}

    def __init__(self, hashed: ParameterHash, device: torch.device, longest_run: int) -> None:
        self.rows = torch.from_numpy(hashed.row_buckets).to(device)
        self.row_signs = torch.from_numpy(hashed.row_signs).to(device)
        self.columns = torch.from_numpy(hashed.column_buckets).to(device)
        self.column_signs = torch.from_numpy(hashed.column_signs).to(device)
        self.width, self.longest_run = hashed.width, longest_run
        self.shape = (len(self.rows), len(self.columns))
        self.segments = [slice(start, start + self.width) for start in range(0, self.shape[1], self.width)]
        buckets = [(self.rows + self.columns[segment.start]) & (self.width - 1) for segment in self.segments]
        half = self.width + longest_run
        self.starts = [RunStarts(starts + half * (self.row_signs < 0)) for starts in buckets]
