"""The Zarr arrays of one generation, block by block.

N rows (examples), S steps, K checkpoints, L stored values of a row.

    step_codes [S, N, L], total_codes [N, L]                chunks of one step and one block
    step_factors, step_norms [S, N]; total_* [N]; losses [K, N]   float32, chunks of one block, fill NaN

A block of rows owns whole chunks, so no two writers share one. It is done when its entry (entries.py) is there; chunks
are written, and made durable, before. The entry holds a digest of each chunk. Chunks are uncompressed (sketches don't
compress) with a CRC-32C at the end, so that rows can be read through a memory map.

This file knows no model, no FAISS and no manifest.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from ..sketches.coding import code_shape
from .entries import BlockEntry, CodedExamples, finished_blocks
from .files import bytes_digest
from .folders import Folder, IndexDamagedError, StorageError
from .manifest import Plan

ARRAYS = "arrays.zarr"
SMALL_ARRAYS = ("step_factors", "total_factors", "step_norms", "total_norms")
READS = 16  # of entries, at once
# Of each array, the dimension of the rows.
ROW_AXES = {"step_codes": 1, "step_factors": 1, "step_norms": 1, "total_codes": 0, "total_factors": 0, "total_norms": 0,
            "losses": 1}  # fmt: skip


class Generation:
    """The arrays of one generation of an index.

    Args:
        folder: the generation's.
        plan: what it holds.
    """

    def __init__(self, folder: Folder, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self._length, self._dtype = code_shape(plan.width, plan.config.bits)
        self._maps: dict[tuple[int | None, int], np.ndarray] = {}
        self._entries: dict[int, BlockEntry] = {}
        self._group: Any = None
        self._arrays: dict[str, Any] = {}

    def create(self) -> None:
        """Makes the empty arrays, all chunks unwritten; an existing folder is completed."""
        with self.folder.clear_errors():
            self._create(zarr.open_group(self.folder.arrays(ARRAYS), mode="a", zarr_format=3))

    def _create(self, group: Any) -> None:
        plan, rows = self.plan, self.plan.block_rows
        steps, examples, length = plan.num_steps, plan.num_examples, self._length
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
        """Stores a block, durably, and then its entry."""
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
        with self.folder.clear_errors(), zarr.config.set({"array.write_empty_chunks": True}):
            group = self._opened("r+")  # a chunk that isn't there was never written: empty ones are written too
            for name, values in written.items():
                group[name][(where,) if name.startswith("total") else (slice(None), where)] = values
        digests = {
            chunk: _digest(written[name] if part is None else written[name][part])
            for chunk, name, part in self._parts(block)
        }
        self.folder.make_durable(f"{ARRAYS}/{chunk}" for chunk in digests)
        entry = BlockEntry(
            block=block,
            num_rows=len(rows),
            loss_sums=tuple(np.nan_to_num(coded.losses).sum(1, dtype=np.float64).tolist()),
            steps_without_gradient=coded.steps_without_gradient,
            skipped=coded.skipped,
            digests=digests,
        )
        entry.write(self.folder)

    def finished(self) -> dict[int, BlockEntry]:
        """Entries of the finished blocks, by block.

        Raises:
            IndexDamagedError: one can't be read.
        """
        blocks = finished_blocks(self.folder)
        with ThreadPoolExecutor(READS) as pool:
            return dict(zip(blocks, pool.map(self.entry, blocks), strict=True))

    def entry(self, block: int) -> BlockEntry:
        """The entry of a finished block.

        Raises:
            IndexDamagedError: it is missing or can't be read.
        """
        return BlockEntry.read(self.folder, block)

    def damages(self, block: int) -> Iterator[tuple[str, str]]:
        """Reads a finished block whole; yields the file of each chunk that is not what was written, and how."""
        entry, rows = self.entry(block), self.plan.rows_of(block)
        where = slice(rows.start, rows.stop)
        try:
            with self.folder.clear_errors():
                self._array("losses")
        except StorageError:
            raise
        except (OSError, KeyError, ValueError) as error:
            yield f"{ARRAYS}/zarr.json", f"can't be read: {error}"
            return
        sizes = self.folder.sizes(f"{ARRAYS}/{chunk}" for chunk, _, _ in self._parts(block))
        for chunk, name, part in self._parts(block):
            file = f"{ARRAYS}/{chunk}"
            at = (where,) if name.startswith("total") else (slice(None) if part is None else part, where)
            if sizes[file] is None:
                yield file, "is missing"
                continue
            try:
                values = self._read(name, at)
            except IndexDamagedError as error:
                yield file, f"can't be read: {error.__cause__}"
                continue
            if _digest(values) != entry.digests[chunk]:
                yield file, "does not match its digest"

    def small_arrays(self, block: int) -> dict[str, np.ndarray]:
        """A finished block's part of the factors and norms, by array; in the arrays' shapes, with n for N.

        Raises:
            IndexDamagedError: a chunk of it is missing or damaged.
        """
        rows, read = self.plan.rows_of(block), {}
        for name in SMALL_ARRAYS:
            read[name] = self._read(name, (..., slice(rows.start, rows.stop)))
            if np.isnan(read[name]).any():
                raise IndexDamagedError(f"array {name} of {self.folder} has rows that were never written")
        return read

    def rows(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """All that is stored of some rows of finished blocks, by array; in the arrays' shapes, with n for N."""
        first, end = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        small = [name for name in ROW_AXES if not name.endswith("_codes")]
        with self.folder.clear_errors():
            read = {name: np.asarray(self._array(name)[..., first:end])[..., rows - first] for name in small}
        steps = [self.codes(step, rows) for step in range(self.plan.num_steps)]
        return read | {"step_codes": np.stack(steps), "total_codes": self.codes(None, rows)}

    def codes(self, step: int | None, rows: np.ndarray) -> np.ndarray:
        """Codes of these rows of one step, or of the total where step is None; [n, L].

        Raises:
            IndexDamagedError: a chunk is missing or cut short.
        """
        out = np.empty((len(rows), self._length), self._dtype)
        order = np.argsort(rows, kind="stable")
        blocks, places = np.divmod(rows[order], self.plan.block_rows)
        starts = np.flatnonzero(np.diff(blocks, prepend=-1)).tolist()
        for start, stop in pairwise([*starts, len(rows)]):
            out[order[start:stop]] = self._map(step, int(blocks[start]))[places[start:stop]]
        return out

    def mapped_codes(self, step: int | None, block: int) -> np.ndarray:
        """All codes of one block, [n, L], in a memory map: of the store, or of the copy in this machine's cache."""
        return self._map(step, block)[: len(self.plan.rows_of(block))]

    def block_codes(self, step: int | None, block: int) -> np.ndarray:
        """`mapped_codes` to be read once: from an object store without the cache."""
        if self.folder.is_local:
            return self.mapped_codes(step, block)
        chunk = _code_chunk(step, block)
        try:
            content = self.folder.read(f"{ARRAYS}/{chunk}")
            codes = np.frombuffer(content, self._dtype, count=len(self.plan.rows_of(block)) * self._length)
        except (FileNotFoundError, ValueError) as error:
            raise self._damaged(chunk, "is missing or cut short") from error
        if _digest(codes) != self._chunk_digest(block, chunk):
            raise self._damaged(chunk, "does not match its digest")
        return codes.reshape(-1, self._length)

    def read_ahead(self, rows: range) -> None:
        """Maps the codes of these rows' blocks and asks the system to read them."""
        for step in (*range(self.plan.num_steps), None):
            for block in self.plan.blocks_of(rows):
                codes: Any = self._map(step, block).base
                codes.base.madvise(mmap.MADV_WILLNEED)

    def size_bytes(self) -> int:
        return sum(size or 0 for size in self.folder.sizes(self.folder.files()).values())

    def _opened(self, mode: Any) -> Any:
        return zarr.open_group(self.folder.arrays(ARRAYS), mode=mode)

    def _array(self, name: str) -> Any:
        """An array to be read, whose description is read once."""
        if self._group is None:
            self._group = self._opened("r")
        if name not in self._arrays:
            self._arrays[name] = self._group[name]
        return self._arrays[name]

    def _read(self, name: str, at: Any) -> np.ndarray:
        """A part of an array.

        Raises:
            IndexDamagedError: its description or a chunk can't be read; the cause says why.
        """
        try:
            with self.folder.clear_errors():
                return np.asarray(self._array(name)[at])
        except StorageError:
            raise
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise IndexDamagedError(f"array {name} of {self.folder} can't be read: {error}") from error

    def _map(self, step: int | None, block: int) -> np.ndarray:
        """The codes of a block in place; where the store is elsewhere, those of the copy that a cache has just now."""
        key = (step, block)
        if key in self._maps:
            return self._maps[key]
        chunk, shape = _code_chunk(step, block), (self.plan.block_rows, self._length)
        digest = partial(self._chunk_digest, block, chunk)
        try:
            with self.folder.local(f"{ARRAYS}/{chunk}", digest, partial(self._codes_digest, block)) as file:
                # A plain array of the map, as in row_table.py.
                mapped = np.asarray(np.memmap(file, dtype=self._dtype, mode="r", shape=shape))
        except (StorageError, IndexDamagedError):
            raise
        except (OSError, ValueError) as error:
            raise self._damaged(chunk, "is missing or cut short") from error
        if self.folder.is_local:
            self._maps[key] = mapped
        return mapped

    def _damaged(self, chunk: str, problem: str) -> IndexDamagedError:
        return IndexDamagedError(f"chunk {self.folder.at(f'{ARRAYS}/{chunk}')} {problem}; `loopsway verify` names more")

    def _chunk_digest(self, block: int, chunk: str) -> str:
        if block not in self._entries:
            self._entries[block] = self.entry(block)
        return self._entries[block].digests[chunk]

    def _codes_digest(self, block: int, file: Path) -> str:
        """Of a file that holds a block's codes, as in the block's entry; of one that is cut short it is another."""
        count = len(self.plan.rows_of(block)) * self._length
        return _digest(np.fromfile(file, dtype=self._dtype, count=count))

    def _parts(self, block: int) -> Iterator[tuple[str, str, int | None]]:
        """Of each chunk of a block: its path in the arrays, its array, and which step of it (None: the array has one
        chunk for all steps).
        """
        for step in range(self.plan.num_steps):
            yield _code_chunk(step, block), "step_codes", step
        yield _code_chunk(None, block), "total_codes", None
        for name in ("step_factors", "step_norms", "losses"):
            yield f"{name}/c/0/{block}", name, None
        for name in ("total_factors", "total_norms"):
            yield f"{name}/c/{block}", name, None


def _code_chunk(step: int | None, block: int) -> str:
    return f"total_codes/c/{block}/0" if step is None else f"step_codes/c/{step}/{block}/0"


def _digest(values: np.ndarray) -> str:
    return bytes_digest(np.ascontiguousarray(values).data)
