"""Reads every code of an index in shards, and merges what they find: the answers are those of one reading.

N rows, M queries, W width.

A *shard* is a range of rows, whole blocks, that one reader reads: in this process, or elsewhere (ray_shards.py). One
that does not answer is left out, and the coverage says so. What merges knows nothing of where shards are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

from .nearest import Compared, GoOn, Near, best_of
from .reading import CodeReader, Efforts
from .scan import Answer

Method: TypeAlias = Literal["search", "scores", "nearest"]  # of CodeReader


class ShardsUnavailableError(RuntimeError):
    """No shard answered, or fewer than the caller asked for."""


@dataclass(frozen=True)
class Coverage:
    """Which shards answered.

    Attributes:
        shards: rows of each that was asked.
        answered: of each, whether it did.
    """

    shards: tuple[range, ...]
    answered: tuple[bool, ...]

    @property
    def share(self) -> float:
        """Shards that answered, of those that were asked."""
        return sum(self.answered) / len(self.answered)

    def __and__(self, other: Coverage) -> Coverage:
        return Coverage(self.shards, tuple(map(min, self.answered, other.answered)))

    def covers(self, rows: np.ndarray) -> np.ndarray:
        """Whether each row is of a shard that answered, bool [n]."""
        starts = [shard.start for shard in self.shards]
        return np.array(self.answered)[np.searchsorted(starts, rows, side="right") - 1]


class Shards(Protocol):
    """Readers of the shards."""

    @property
    def rows(self) -> Sequence[range]:
        """Of each shard, in order; together all of the index."""
        ...

    def ask(
        self,
        method: Method,
        arguments: Sequence[Any],
        *,
        kept: np.ndarray | None,
        deadline: float | None,
        go_on: GoOn | None = None,
    ) -> list[Any]:
        """Calls a method of each shard's CodeReader.

        Args:
            method: its name.
            arguments: its own, by position.
            kept: bool [N], rows that may be found, of which each is given its own; None: not to be given, or all.
            deadline: when to stop waiting, by `time.monotonic()`; None: when the shards themselves do.
            go_on: for a method that takes one, of shards in this process alone; None: not to be given.

        Returns:
            What each gave; None for one that did not answer.
        """
        ...

    def warm_up(self) -> None:
        """Reads, or fetches, what readings read."""
        ...

    def close(self) -> None:
        """Lets the shards go."""
        ...


class LocalShards:
    """Shards in this process, one after another; they always answer, whatever the deadline."""

    def __init__(self, readers: Sequence[CodeReader]) -> None:
        self._readers = readers

    @property
    def rows(self) -> Sequence[range]:
        return [reader.rows for reader in self._readers]

    def ask(
        self,
        method: Method,
        arguments: Sequence[Any],
        *,
        kept: np.ndarray | None,
        deadline: float | None,
        go_on: GoOn | None = None,
    ) -> list[Any]:
        more = {} if go_on is None else {"go_on": go_on}
        return [
            getattr(reader, method)(*arguments, **own_rows(method, reader.rows, kept), **more)
            for reader in self._readers
        ]

    def warm_up(self) -> None:
        for reader in self._readers:
            reader.warm_up()

    def close(self) -> None:
        pass


class ShardedReader:
    """Reads through shards."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    @property
    def reads_everything(self) -> bool:
        """Whether approximate searches read every code as well: FAISS indices are not of single shards."""
        return len(self._shards.rows) > 1

    def warm_up(self) -> None:
        self._shards.warm_up()

    def close(self) -> None:
        self._shards.close()

    def search(
        self,
        asked: Mapping[int | None, np.ndarray],
        k: int,
        *,
        kept: np.ndarray | None,
        efforts: Efforts | None,
        deadline: float | None,
    ) -> tuple[dict[int | None, list[Answer]], Coverage]:
        """As `CodeReader.search`, with kept of all rows, bool [N]."""
        efforts = None if self.reads_everything else efforts
        found, coverage = self._asked("search", (asked, k, efforts), kept, deadline)
        if len(found) == 1:
            return found[0], coverage
        merged = {
            slot: [_merged([each[slot][query] for each in found]) for query in range(len(queries))]
            for slot, queries in asked.items()
        }
        return merged, coverage

    def scores(self, slot: int | None, queries: np.ndarray, *, deadline: float | None) -> tuple[np.ndarray, Coverage]:
        """As `CodeReader.scores`, float32 [M, N]; 0 for rows that are not covered."""
        found = self._shards.ask("scores", (slot, queries), kept=None, deadline=deadline)
        coverage = self._coverage(found)
        if len(found) == 1:
            return found[0], coverage
        columns = [
            np.zeros((len(queries), len(rows)), np.float32) if each is None else each
            for each, rows in zip(found, self._shards.rows, strict=True)
        ]
        return np.concatenate(columns, axis=1), coverage

    def nearest(
        self,
        slot: int | None,
        asked: Compared,
        *,
        kept: np.ndarray,
        deadline: float | None,
        go_on: GoOn | None = None,
    ) -> tuple[list[Near], Coverage]:
        """As `CodeReader.nearest`, with kept of all rows, bool [N]."""
        found, coverage = self._asked("nearest", (slot, asked), kept, deadline, go_on)
        return [best_of(each, asked.k) for each in zip(*found, strict=True)], coverage

    def _asked(
        self,
        method: Method,
        arguments: Sequence[Any],
        kept: np.ndarray | None,
        deadline: float | None,
        go_on: GoOn | None = None,
    ) -> tuple[list[Any], Coverage]:
        """What shards gave, of those that answered."""
        found = self._shards.ask(method, arguments, kept=kept, deadline=deadline, go_on=go_on)
        return [each for each in found if each is not None], self._coverage(found)

    def _coverage(self, found: Sequence[Any]) -> Coverage:
        coverage = Coverage(tuple(self._shards.rows), tuple(each is not None for each in found))
        if not any(coverage.answered):
            raise ShardsUnavailableError(
                f"none of {len(found)} shards answered in time: they are busy or being started again; ask again later"
            )
        return coverage


def own_rows(method: Method, rows: range, kept: np.ndarray | None) -> dict[str, Any]:
    """The argument that is a shard's own."""
    if method == "scores":
        return {}
    return {"kept": None if kept is None else kept[rows.start : rows.stop]}


def shard_rows(blocks: Sequence[range], count: int) -> list[range]:
    """Rows of `count` shards, or of fewer if there are fewer blocks: whole blocks, about as many rows each.

    Args:
        blocks: rows of the index's blocks, in order; at least one.
        count: at least 1.
    """
    ends = np.array([block.stop for block in blocks])
    ideal = ends[-1] * np.arange(1, count) / count
    cuts = np.unique(ends[np.abs(ends[None] - ideal[:, None]).argmin(1)]) if count > 1 else np.empty(0, np.int64)
    edges = [0, *(int(cut) for cut in cuts if cut < ends[-1]), int(ends[-1])]
    return [range(start, stop) for start, stop in pairwise(edges)]


def _merged(answers: Sequence[Answer]) -> Answer:
    rows, scores = (np.concatenate([answer[place] for answer in answers]) for place in (0, 1))
    order = np.lexsort((rows, -scores))
    return rows[order], scores[order]
