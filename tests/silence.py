"""An index read in shards in this process, of which some do not answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopsway.indexer import Index
from loopsway.indexer.search.sharded import LocalShards, Method, ShardedReader, shard_rows


class SomeShards(LocalShards):
    """Those of `silent` do not answer, as long as they are in there."""

    silent: Sequence[int] = ()

    def ask(self, method: Method, arguments: Sequence[Any], **options: Any) -> list[Any]:
        found = super().ask(method, arguments, **options)
        return [None if shard in self.silent else each for shard, each in enumerate(found)]


def read_in_shards(index: Index, count: int, silent: Sequence[int] = ()) -> SomeShards:
    """Has the index read in shards, each opened by itself."""
    readers = [Index(index.path, index.generation, rows=rows).codes for rows in shard_rows(index.blocks(), count)]
    assert len(readers) == count
    shards = SomeShards(readers)
    shards.silent = silent
    index.reader = ShardedReader(shards)
    return shards
