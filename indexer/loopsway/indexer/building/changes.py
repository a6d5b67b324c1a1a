"""Whether a cut build may be gone on with: its first examples must still have the sketches that it stored.

The plan's digests see files and batches; this sees whatever else decides a gradient: the model's code, a library.
"""

from __future__ import annotations

import numpy as np
import torch

from ..sketches.features import ExampleSketches
from ..store.folders import Folder
from ..store.generation import Generation
from ..store.manifest import IndexExistsError

# Relative; other hardware, threads and batches change half precision by about 1e-2.
TOLERANCE = 0.05


def refuse_changed_results(folder: Folder, generation: Generation, probe: ExampleSketches) -> None:
    """Compares losses and norms of the probe, the first finite examples, with those of block 0.

    Raises:
        IndexExistsError: they are others.
    """
    skipped = {each.row for each in generation.entry(0).skipped}
    rows = [row for row in generation.plan.rows_of(0) if row not in skipped][: len(probe.values)]
    if not rows:
        return
    sketches = probe.values[: len(rows)]
    now = {
        "losses": probe.losses[:, : len(rows)].numpy(),
        "step_norms": torch.linalg.vector_norm(sketches, dim=2).T.numpy(),
        "total_norms": torch.linalg.vector_norm(sketches.sum(1), dim=1).numpy(),
    }
    then = generation.rows(np.array(rows))
    for name, values in now.items():
        stored = then[name]
        slack = TOLERANCE * max(float(np.abs(stored).max()), 1e-30)
        if np.abs(values - stored).max() > slack:
            raise IndexExistsError(
                f"{folder} was begun with another model, other code or other libraries: the {name.replace('_', ' ')} "
                f"of its first examples were {_shown(stored)} and are now {_shown(values)}; go on with what it was "
                "begun with, build to another path, or remove that folder"
            )


def _shown(values: np.ndarray) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values.ravel()[:4]) + "]"
