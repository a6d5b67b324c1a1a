"""The Zarr arrays of one generation, and the log of its finished blocks.

N rows (examples), S steps, K checkpoints, L stored values of a row.

    step_codes [S, N, L], total_codes [N, L]                chunks of one step and one block
    step_factors, step_norms [S, N]; total_* [N]; losses [K, N]   float32, chunks of one block, fill NaN

A block of rows owns whole chunks, so no two writers share one. It is done when its line is durably in `blocks.jsonl`;
chunks are written, and made durable, before. Chunks are uncompressed (sketches don't compress) with a CRC-32C at the
end, so that rows can be read through a memory map.

This file knows no model, no FAISS and no manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from .coding import Codes, code_shape
from .files import sync
from .manifest import IndexDamagedError, Plan

ARRAYS = "arrays.zarr"
BLOCK_LOG = "blocks.jsonl"


@dataclass(frozen=True, kw_only=True, eq=False)
class CodedExamples:
    """Coded rows of n consecutive examples: a batch's, or a block's.

    Attributes:
        steps: codes of [n * S] rows, example after example.
        total: codes of [n] rows.
        losses: [K, n].
        steps_without_gradient: in every one of the examples.
    """

    steps: Codes
    total: Codes
    losses: np.ndarray
    steps_without_gradient: tuple[int, ...]

    @classmethod
    def joined(cls, parts: Sequence[CodedExamples]) -> CodedExamples:
        silent = [set(part.steps_without_gradient) for part in parts]
        return cls(
            steps=Codes.joined([part.steps for part in parts]),
            total=Codes.joined([part.total for part in parts]),
            losses=np.concatenate([part.losses for part in parts], axis=1),
            steps_without_gradient=tuple(sorted(silent[0].intersection(*silent[1:]))),
        )


@dataclass(frozen=True, kw_only=True)
class BlockEntry:
    """A line of the block log."""

    block: int
    num_rows: int
    loss_sums: list[float]
    steps_without_gradient: list[int]
    digest: str


class Generation:
    """The arrays of one generation of an index.

    Args:
        path: the generation's folder.
        plan: what it holds.
    """

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self._length, self._dtype = code_shape(plan.width, plan.config.bits)
        self._maps: dict[tuple[int | None, int], np.ndarray] = {}

    def create(self) -> None:
        """Makes the empty arrays, all chunks unwritten; an existing folder is completed."""
        plan, rows = self.plan, self.plan.block_rows
        steps, examples, length = plan.num_steps, plan.num_examples, self._length
        group = zarr.open_group(self.path / ARRAYS, mode="a", zarr_format=3)
        codes: dict[str, Any] = {"dtype": self._dtype, "fill_value": 0 if self._dtype == np.uint8 else np.nan}
        floats: dict[str, Any] = {"dtype": np.float32, "fill_value": np.nan}
        for name, shape, chunks, kind in (
            ("step_codes", (steps, examples, length), (1, rows, length), codes),
            ("total_codes", (examples, length), (rows, length), codes),
            ("step_factors", (steps, examples), (steps, rows), floats),
            ("step_norms", (steps, examples), (steps, rows), floats),
            ("total_factors", (examples,), (rows,), floats),
            ("total_norms", (examples,), (rows,), floats),
            ("losses", (len(plan.checkpoints), examples), (len(plan.checkpoints), rows), floats),
        ):
            if name not in group:
                group.create_array(name, shape=shape, chunks=chunks, compressors=[Crc32cCodec()], **kind)

    def write(self, block: int, coded: CodedExamples) -> None:
        """Stores a block, durably, and then its line in the log."""
        rows, steps = self.plan.rows_of(block), self.plan.num_steps
        where, by_example = slice(rows.start, rows.stop), (len(rows), steps)
        written = {
            "step_codes": coded.steps.codes.reshape(*by_example, self._length).swapaxes(0, 1),
            "step_factors": coded.steps.factors.reshape(by_example).T,
            "step_norms": coded.steps.norms.reshape(by_example).T,
            "total_codes": coded.total.codes,
            "total_factors": coded.total.factors,
            "total_norms": coded.total.norms,
            "losses": coded.losses,
        }
        group, digest = self._group("r+"), hashlib.blake2b(digest_size=16)
        for name, values in written.items():
            rows_at = (where,) if name.startswith("total") else (slice(None), where)
            group[name][rows_at] = values
            digest.update(np.ascontiguousarray(values).data)
        for file in self._chunk_files(block):
            sync(file)
        self._log(
            BlockEntry(
                block=block,
                num_rows=len(rows),
                loss_sums=coded.losses.sum(1, dtype=np.float64).tolist(),
                steps_without_gradient=list(coded.steps_without_gradient),
                digest=digest.hexdigest(),
            )
        )

    def finished(self) -> dict[int, BlockEntry]:
        """Entries of the block log by block. A line cut off by a crash is dropped: its block is computed again.

        Raises:
            IndexDamagedError: a whole line of it can't be read.
        """
        log = self.path / BLOCK_LOG
        if not log.exists():
            return {}
        text = log.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            os.truncate(log, len(whole.encode()))
        try:
            entries = [BlockEntry(**json.loads(line)) for line in whole.splitlines()]
        except (TypeError, ValueError) as error:
            raise IndexDamagedError(
                f"block log {log} is damaged: {error}; remove the index's folder and build again"
            ) from error
        return {entry.block: entry for entry in entries}

    def array(self, name: str) -> np.ndarray:
        """One of the small arrays (factors, norms, losses), whole.

        Raises:
            IndexDamagedError: a chunk of it is missing or damaged.
        """
        try:
            values = np.asarray(self._group("r")[name][...])
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise IndexDamagedError(f"array {name} of {self.path} can't be read: {error}") from error
        if np.isnan(values).any():
            raise IndexDamagedError(f"array {name} of {self.path} has rows that were never written")
        return values

    def codes(self, step: int | None, rows: np.ndarray) -> np.ndarray:
        """Codes of these rows of one step, or of the total where step is None; [n, L].

        Raises:
            IndexDamagedError: a chunk is missing or cut short.
        """
        out = np.empty((len(rows), self._length), self._dtype)
        blocks, places = np.divmod(rows, self.plan.block_rows)
        for block in np.unique(blocks):
            chosen = blocks == block
            out[chosen] = self._map(step, int(block))[places[chosen]]
        return out

    def block_codes(self, step: int | None, block: int) -> np.ndarray:
        """All codes of one block, [n, L], as a memory map."""
        return self._map(step, block)[: len(self.plan.rows_of(block))]

    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def _group(self, mode: Any) -> Any:
        return zarr.open_group(self.path / ARRAYS, mode=mode)

    def _map(self, step: int | None, block: int) -> np.ndarray:
        key = (step, block)
        if key not in self._maps:
            file = self._code_file(step, block)
            shape = (self.plan.block_rows, self._length)
            try:
                self._maps[key] = np.memmap(file, dtype=self._dtype, mode="r", shape=shape)
            except (OSError, ValueError) as error:
                raise IndexDamagedError(f"chunk {file} is missing or cut short: {error}") from error
        return self._maps[key]

    def _code_file(self, step: int | None, block: int) -> Path:
        arrays = self.path / ARRAYS
        if step is None:
            return arrays / "total_codes" / "c" / str(block) / "0"
        return arrays / "step_codes" / "c" / str(step) / str(block) / "0"

    def _chunk_files(self, block: int) -> list[Path]:
        arrays, number = self.path / ARRAYS, str(block)
        files = [self._code_file(step, block) for step in (None, *range(self.plan.num_steps))]
        files += [arrays / name / "c" / "0" / number for name in ("step_factors", "step_norms", "losses")]
        return [*files, *(arrays / name / "c" / number for name in ("total_factors", "total_norms"))]

    def _log(self, entry: BlockEntry) -> None:
        with (self.path / BLOCK_LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(asdict(entry)) + "\n")
            log.flush()
            os.fsync(log.fileno())
        sync(self.path)
