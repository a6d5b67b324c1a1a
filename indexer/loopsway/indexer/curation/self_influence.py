"""Self-influence: how much a step on an example lowers its own loss, the squared norm of its gradient.

Mislabelled and atypical examples have the largest (Pruthi et al. 2020, section 4.1). It is read off the stored norms,
which are of float32 sketches before coding: no code and no model is needed.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ..search.index import Index, open_index
from ..search.ranking import Scores
from ..store.addresses import open_folder
from ..store.files import json_bytes
from ..store.folders import clear_storage_errors
from ..store.output import begin_output, write_table
from .score_table import Fractions, score_table

DESCRIPTION, FILE = "scores.json", "scores-00000.parquet"


def self_influences(index: Index) -> Scores:
    """Each example's influence on itself, as of one query: in total, and of each step with the same step."""
    rows = index.sketched_rows()
    norms = np.vstack([index.total_norms()[rows], index.step_norms()[:, rows]]).astype(np.float64)
    influences = (norms**2)[None]
    return Scores(
        rows=rows,
        steps=(None, *range(index.num_steps)),
        influences=influences.astype(np.float32),
        standard_errors=(influences * math.sqrt(2 / index.width)).astype(np.float32),
    )


def score_self_influence(
    index: Index | str | Path, out: str | Path, *, top: float | None = None, bottom: float | None = None
) -> tuple[str, ...]:
    """Writes `self_influences` as `score_examples` writes its scores.

    Args:
        index: open, or its path.
        out: a folder, or URL, that is empty or holds the beginning of this job.
        top: keep only this share of the examples, those of largest self-influence, at each step; with `bottom`, both.
        bottom: keep only this share, those of smallest self-influence.

    Returns:
        The name of the file, in a tuple.

    Raises:
        FileExistsError, IndexNotFoundError, IndexDamagedError, StorageError, ValueError: as `score_examples`.
    """
    index, folder, fractions = (
        index if isinstance(index, Index) else open_index(index),
        open_folder(out),
        Fractions(top=top, bottom=bottom),
    )
    description = {
        **{"index": index.name, "generation": index.generation, "created_at": index.created_at},
        **{"fingerprint": index.fingerprint, "self_influence": True, "top": top, "bottom": bottom},
    }
    with clear_storage_errors(folder):
        begin_output(folder, DESCRIPTION, json_bytes(description))
        write_table(folder, FILE, score_table(self_influences(index), index.examples["id"], fractions))
    return (FILE,)
