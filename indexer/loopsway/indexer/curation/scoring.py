"""Scores every training example on a query set, into Parquet files (score_table.py) in a folder.

    scores.json              what was scored
    scores-00000.parquet     of the queries' mean; or of each query, some queries a file
    sum.npz                  of the sketches so far, while the queries' mean is being made

The influence on the mean of queries is that of their mean sketch, because influence is linear in the query: it costs
one reading of the codes, however many queries there are.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..config import Resolve
from ..progress import BuildProgress
from ..search.filters import matching_rows
from ..search.index import Index, open_index
from ..search.ranking import pairs
from ..stopping import stop_on_signals
from ..store.addresses import open_folder
from ..store.files import json_bytes
from ..store.folders import Folder, clear_storage_errors
from ..store.output import begin_output, fill, write_table
from .query_set import QuerySet, SketchedQueries
from .score_table import Fractions, score_table

Per = Literal["mean", "each"]

DESCRIPTION, SUM = "scores.json", "sum.npz"
SCORES_BYTES = 64 << 20  # of the influences and standard errors of a file; making them takes up to seven times that
MOST_TOGETHER = 256  # queries that are sketched between two points at which the job can be cut


def score_examples(
    index: Index | str | Path,
    queries: QuerySet | Any,
    out: str | Path,
    *,
    per: Per = "mean",
    resolve: Resolve = "query_step",
    where: str | None = None,
    top: float | None = None,
    bottom: float | None = None,
    progress: bool = True,
) -> tuple[str, ...]:
    """Every training example's influence on a query set. Stopped or killed and called again, it goes on.

    Args:
        index: open, or its path.
        queries: a QuerySet, or sketches, float32 [Q, T, W].
        out: a folder, or URL, that is empty or holds the beginning of this job.
        per: "mean": the influence on the mean of the queries' losses; "each": on each query.
        resolve: as in `Index.search`.
        where: a filter over the examples; ranks and shares are within it.
        top: keep only this share of the examples, those of largest influence, at each step; with `bottom`, both.
        bottom: keep only this share, those of smallest influence.
        progress: whether to draw progress on the terminal.

    Returns:
        Names of the files of scores, in the queries' order. Skipped and deleted examples are in none.

    Raises:
        FileExistsError: `out` holds something else.
        FilterError, ValueError: `where`, a share, `per`, or a query.
        StoppedError: a signal asked it to stop.
        IndexNotFoundError, IndexDamagedError, StorageError: as `open_index`.
    """
    if per not in get_args(Per):
        raise ValueError(f"per is {per!r}, expected one of {', '.join(get_args(Per))}")
    index = index if isinstance(index, Index) else open_index(index)
    asked = queries if isinstance(queries, QuerySet) else SketchedQueries(queries, index.width)
    fractions = Fractions(top=top, bottom=bottom)
    pairs(resolve, index.num_steps, index.num_steps)  # an unknown name is told before anything is sketched
    if where is not None:
        matching_rows(index.examples, where)
    description = {
        **{"index": index.name, "generation": index.generation, "created_at": index.created_at},
        **{"fingerprint": index.fingerprint, "queries": len(asked), "queries_digest": asked.digest},
        **{"per": per, "resolve": resolve, "where": where, "top": top, "bottom": bottom},
    }
    folder = open_folder(out)
    with clear_storage_errors(folder):
        begin_output(folder, DESCRIPTION, json_bytes(description))

    def write(name: str, sketches: np.ndarray, ids: list[str] | None) -> None:
        scores = index.scores(sketches, resolve, where=where)
        write_table(folder, name, score_table(scores, index.examples["id"], fractions, ids))

    if per == "mean":
        return _score_mean(folder, asked, write, progress=progress)
    together = max(1, min(MOST_TOGETHER, SCORES_BYTES // (8 * (index.num_steps + 1) * index.num_rows)))
    chunks = {_file(number): chunk for number, chunk in enumerate(_chunks(asked, together))}

    def score(name: str, chunk: range) -> None:
        write(name, asked.sketches(chunk), [asked.ids[query] for query in chunk])

    fill(folder, chunks, score, doing="scoring queries", progress=progress)
    return tuple(chunks)


def _score_mean(folder: Folder, queries: QuerySet, write: Callable[..., None], *, progress: bool) -> tuple[str, ...]:
    """Adds the queries' sketches up, each sum a file until the next one is; then scores their mean."""
    name = _file(0)
    with clear_storage_errors(folder):
        if folder.sizes([name])[name] is None:
            total, done = _begun(folder)
            with BuildProgress(shown=progress) as bars, stop_on_signals(bars.announce_stop) as stop:
                bars.begin("sketching queries", len(queries), done=done)
                for chunk in _chunks(queries, MOST_TOGETHER, done):
                    total = _added(total, queries.sketches(chunk), queries.ids[chunk.start])
                    folder.write(SUM, _npz(total, chunk.stop))
                    bars.advance(len(chunk))
                    stop.raise_if_asked(f"stopped as asked: {folder} is not whole; run the same command to go on")
            assert total is not None
            write(name, (total / len(queries)).astype(np.float32)[None], None)
        if SUM in folder.files():
            folder.remove([SUM])
    return (name,)


def _added(total: np.ndarray | None, sketches: np.ndarray, first: str) -> np.ndarray:
    own = sketches.sum(0, dtype=np.float64)
    if total is not None and total.shape != own.shape:
        raise ValueError(
            f"queries before {first} ran {len(total)} steps, those from there on {len(own)}: a mean needs queries "
            "of one number of steps; score them apart"
        )
    return own if total is None else total + own


def _begun(folder: Folder) -> tuple[np.ndarray | None, int]:
    """The sum of the sketches so far, and of how many."""
    if SUM not in folder.files():
        return None, 0
    with np.load(io.BytesIO(folder.read(SUM)), allow_pickle=False) as begun:
        return begun["total"], int(begun["count"])


def _npz(total: np.ndarray, count: int) -> bytes:
    file = io.BytesIO()
    np.savez(file, total=total, count=np.array(count))
    return file.getvalue()


def _chunks(queries: QuerySet, together: int, done: int = 0) -> Iterator[range]:
    for start in range(done, len(queries), together):
        yield range(start, min(start + together, len(queries)))


def _file(number: int) -> str:
    return f"scores-{number:05d}.parquet"
