"""A parameter's hash as tensors on the device of its gradients.

B examples, T tokens, I inputs (columns), O outputs (rows), W width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .hashes import ParameterHash, parameter_hash


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
        starts: for each segment, where the rows' runs start in a `RunAccumulator`, signs included, int64 [O].
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
        self.starts = [starts + (self.width + longest_run) * (self.row_signs < 0) for starts in buckets]
