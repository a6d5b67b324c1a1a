"""What is written of a block: the coded rows of its examples, and the entry that says it is finished.

K checkpoints, S steps. An entry is the file `blocks/NNNNNN.json`, written last and durably.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..sketches.coding import Codes
from .folders import Folder, IndexDamagedError
from .sealed import SealError, read_sealed, write_sealed

BLOCKS = "blocks"


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """An example without a finite loss or gradient.

    Attributes:
        row: of the generation.
        reason: what is not finite, and at which checkpoint.
    """

    row: int
    reason: str


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedExamples:
    """Coded rows of n consecutive examples: a batch's, or a block's.

    Attributes:
        steps: codes of [n * S] rows, example after example.
        total: codes of [n] rows.
        losses: [K, n]; NaN for those that were skipped.
        steps_without_gradient: in every one of the examples.
        skipped: those whose rows are zeros because their loss or gradient is not finite.
    """

    steps: Codes
    total: Codes
    losses: np.ndarray
    steps_without_gradient: tuple[int, ...]
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[CodedExamples]) -> CodedExamples:
        silent = [set(part.steps_without_gradient) for part in parts]
        return cls(
            steps=Codes.joined([part.steps for part in parts]),
            total=Codes.joined([part.total for part in parts]),
            losses=np.concatenate([part.losses for part in parts], axis=1),
            steps_without_gradient=tuple(sorted(silent[0].intersection(*silent[1:]))),
            skipped=tuple(each for part in parts for each in part.skipped),
        )


@dataclass(frozen=True, kw_only=True)
class BlockEntry:
    """What is kept of a finished block.

    Attributes:
        loss_sums: [K], of its examples without the skipped ones.
        steps_without_gradient: in every one of the examples.
        skipped: those whose rows are zeros.
        digests: of the block's part of each array, by the chunk's path in `arrays.zarr`.
    """

    block: int
    num_rows: int
    loss_sums: tuple[float, ...]
    steps_without_gradient: tuple[int, ...]
    skipped: tuple[Skipped, ...]
    digests: dict[str, str]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockEntry:
        made = {**data, "skipped": tuple(Skipped(**each) for each in data["skipped"])}
        for name in ("loss_sums", "steps_without_gradient"):
            made[name] = tuple(data[name])
        return cls(**made)

    def write(self, folder: Folder) -> None:
        """Notes in the generation's folder that the block is finished."""
        write_sealed(folder, entry_file(self.block), asdict(self))

    @classmethod
    def read(cls, folder: Folder, block: int) -> BlockEntry:
        """The entry of a finished block.

        Raises:
            IndexDamagedError: it is missing or can't be read.
        """
        try:
            return cls.from_dict(read_sealed(folder, entry_file(block)))
        except FileNotFoundError as error:
            raise IndexDamagedError(f"the entry of block {block} is missing") from error
        except SealError as error:
            raise IndexDamagedError(str(error)) from error


def entry_file(block: int) -> str:
    return f"{BLOCKS}/{block:06d}.json"


def finished_blocks(folder: Folder) -> list[int]:
    """Those that have an entry."""
    return [int(Path(file).stem) for file in folder.files(BLOCKS) if file.endswith(".json")]
