"""The FAISS indices of one slot, for other tools and for approximate search: files, and candidates from them.

N rows, M queries, W width, k results of each sign.

A slot has a FAISS index, and a file, for each *shard* of its rows, so that building one takes bounded memory. It holds
the decoded rows, all multiplied by one number. What an approximate search may cost is its *effort*, a power of two that
multiplies the cells that are visited or the part of a graph that is walked, and the candidates that are scored again:
these by its square root where there are cells, which are then what falls short first.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np

from ..store.folders import FileFacts, IndexDamagedError
from ..store.generation import Generation
from . import faiss_index

FOLDER = "faiss"
EXTRA_CANDIDATES = 32
MOST_CANDIDATES = 1 / 4  # of a shard's rows: scoring so many of either sign again costs as much as a scan, or more
LEAST_NORM = 64  # of rows where FAISS needs long ones
SHARD_BYTES, MOST_SHARDS = 32 << 20, 64  # a shard has at least so many bytes of codes, a slot at most so many shards


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedRows:
    """How the rows of a slot are read.

    Attributes:
        rows: those of these numbers, float32 [n, W].
        blocks: all in a range that begins with a block, a block at a time, float32 [n, W].
    """

    rows: Callable[[np.ndarray], np.ndarray]
    blocks: Callable[[range], Iterable[np.ndarray]]


class Shards:
    """The FAISS indices of one step of a generation, or of its total.

    Args:
        generation: the stored rows.
        step: its number; None is the total over steps.
        norms: [N] of the sketches.
        files: facts of the generation's files, by name; the indices are opened when they are needed.
        factory: that new ones are made by; None: by the bits of the codes.
    """

    def __init__(
        self,
        generation: Generation,
        step: int | None,
        *,
        norms: np.ndarray,
        files: Mapping[str, FileFacts],
        factory: str | None,
    ) -> None:
        self._generation, self._norms, self._files, self._factory = generation, norms, files, factory
        self._name = "total" if step is None else f"step-{step:04d}"
        self._rows = generation.plan.shards()
        self._indices: list[Any] = []
        self._loading = threading.Lock()

    def file_name(self, shard: int) -> str:
        """Of its FAISS index, within the generation's folder."""
        return f"{FOLDER}/{self._name}-{shard:02d}.faiss"

    def build(self, decoded: DecodedRows) -> dict[str, FileFacts]:
        """Makes the indices, one after another, and writes the files that are used from now on.

        Returns:
            Their facts, by name.

        Raises:
            ValueError: FAISS can't be trained on these rows.
        """
        plan, written = self._generation.plan, {}
        for shard, rows in enumerate(self._rows):
            index = faiss_index.new_index(self._factory, plan.width, plan.config.bits, len(rows))
            scale = self._scale(index)
            extremes = partial(_extremes, decoded.blocks, rows, scale)
            faiss_index.train(index, extremes, partial(_sample, decoded.rows, rows, scale))
            for block in decoded.blocks(rows):
                index.add(block * scale)
            write = partial(faiss_index.write, index)
            written[self.file_name(shard)] = self._generation.folder.write_file(self.file_name(shard), write)
        self._files, self._indices = written, []
        return written

    def unload(self) -> None:
        """Frees the indices."""
        self._indices = []

    def full_effort(self, k: int) -> int:
        """The least effort beyond which nothing more is searched for k results: every cell, all candidates."""
        effort = 1
        while any(
            effort < faiss_index.num_cells(index) or _num_candidates(index, k, effort) < _most_candidates(len(rows), k)
            for index, rows in zip(self._opened(), self._rows, strict=True)
        ):
            effort *= 2
        return effort

    def can_search_within(self, kept: np.ndarray | None) -> bool:
        """Whether what was measured of the indices holds within these rows, bool [N]; None: all."""
        return kept is None or kept.mean() >= max(map(faiss_index.least_share, self._opened()))

    def candidates(self, queries: np.ndarray, k: int, *, effort: int, kept: np.ndarray | None) -> list[np.ndarray]:
        """Rows that can be among the k of largest, or of smallest, inner product with each query.

        Args:
            queries: float32 [M, W].
            k: results of each sign.
            effort: at least 1.
            kept: bool [N], those that may be found; None: all.

        Returns:
            For each query ascending rows, int64.
        """
        both = np.ascontiguousarray(np.concatenate([queries, -queries]))
        shards = range(len(self._rows))
        found = np.concatenate([self._of_shard(shard, both, k, effort, kept) for shard in shards], axis=1)
        pairs = zip(found[: len(queries)], found[len(queries) :], strict=True)
        joined = (np.union1d(mine, others) for mine, others in pairs)
        return [rows[rows >= 0] for rows in joined]

    def _of_shard(self, shard: int, queries: np.ndarray, k: int, effort: int, kept: np.ndarray | None) -> np.ndarray:
        """Rows that score highest, as the FAISS index sees it, int64 [M, n]; -1 for none."""
        index, rows = self._opened()[shard], self._rows[shard]
        own = None if kept is None else kept[rows.start : rows.stop]
        num_kept = len(rows) if own is None else int(own.sum())
        count = min(_num_candidates(index, k, effort), _most_candidates(len(rows), k))
        if num_kept <= count:  # all of them: FAISS has nothing to say
            every = np.arange(len(rows)) if own is None else np.flatnonzero(own)
            return np.tile(every + rows.start, (len(queries), 1))
        reach = effort * len(rows) // num_kept  # so that as many rows that may be found are met as without a filter
        resized = _resized(queries, self._norm_range[1] * float(self._scale(index)))
        found = faiss_index.search(index, resized, count, reach=reach, kept=own)
        return np.where(found < 0, -1, found + rows.start)

    @cached_property
    def _norm_range(self) -> tuple[float, float]:
        """The least and the largest of rows that are not zero."""
        live = self._norms[self._norms > 0]
        return (float(live.min()), float(live.max())) if len(live) else (1.0, 1.0)

    def _scale(self, index: Any) -> np.float32:
        """What rows are multiplied by: float16 ends at 65,504, and some indices need long rows."""
        least, largest = self._norm_range
        return np.float32(
            LEAST_NORM / max(least, largest / 1e15) if faiss_index.needs_long_rows(index) else 1 / largest
        )

    def _opened(self) -> list[Any]:
        with self._loading:
            if not self._indices:
                shards = enumerate(self._rows)
                self._indices = [self._read(self.file_name(shard), len(rows)) for shard, rows in shards]
            return self._indices

    def _read(self, name: str, num_rows: int) -> Any:
        folder = self._generation.folder
        with folder.local(name, lambda: self._files[name]["digest"]) as file:
            try:
                index = faiss_index.read(file)
            except RuntimeError as error:
                raise IndexDamagedError(f"FAISS index {folder.at(name)} can't be read: {error}") from error
            folder.keep(file, index)
        expected, found = (num_rows, self._generation.plan.width), (index.ntotal, index.d)
        if found != expected:
            raise IndexDamagedError(f"FAISS index {folder.at(name)} has (rows, width) {found}, not {expected}")
        return index


def shard_rows(num_examples: int, bytes_of_a_row: int, block_rows: int) -> int:
    """Rows of a shard for a new part: whole blocks."""
    least = max(SHARD_BYTES // bytes_of_a_row, -(-num_examples // MOST_SHARDS))
    return -(-least // block_rows) * block_rows


def _num_candidates(index: Any, k: int, effort: int) -> int:
    """Of one shard, for one sign."""
    growth = math.sqrt(effort) if faiss_index.num_cells(index) > 1 else effort
    return math.ceil(growth * max(2 * k, k + EXTRA_CANDIDATES))


def _most_candidates(num_rows: int, k: int) -> int:
    return max(2 * k, k + EXTRA_CANDIDATES, int(num_rows * MOST_CANDIDATES))


def _resized(queries: np.ndarray, length: float) -> np.ndarray:
    """Queries as long as the longest row.

    Some indices estimate <query - c, row - c> around a centre c of norm 1, in which a short query drowns, and take the
    inner product from a squared distance, in which a row is lost beside a far longer query.
    """
    tiny = np.finfo(np.float32).tiny
    peaked = queries / np.maximum(np.abs(queries).max(1, keepdims=True), tiny)  # whose squares are in float32
    return peaked * np.float32(length) / np.maximum(np.linalg.norm(peaked, axis=1, keepdims=True), tiny)


def _extremes(blocks: Callable[[range], Iterable[np.ndarray]], rows: range, scale: np.float32) -> np.ndarray:
    """The least and the largest of each coordinate, [2, W]."""
    lows, highs = zip(*((block.min(0), block.max(0)) for block in blocks(rows)), strict=True)
    return np.stack([np.min(lows, axis=0), np.max(highs, axis=0)]) * scale


def _sample(read: Callable[[np.ndarray], np.ndarray], rows: range, scale: np.float32, count: int) -> np.ndarray:
    """Rows to train on, at most so many, the same each time."""
    chosen = np.random.default_rng(0).choice(rows, min(count, len(rows)), replace=False)
    return read(np.sort(chosen)) * scale
