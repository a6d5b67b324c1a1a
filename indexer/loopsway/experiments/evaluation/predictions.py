"""What methods say of one training, kept as a file; and the names of the methods.

N training examples, Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

TRACIN, WHOLE, ADAM, COSINE = "TracIn", "TracIn, whole model", "TracIn, optimizer-aware", "cosine"
FIRST_STEP, LAST_STEP = "first step with itself", "last step with itself"
SAME_STEPS = "same steps, added up"
EXACT, LOSS, RANDOM = "step-decomposed-influence, exact", "loss", "random"
BERGSON, BERGSON_ADDED = "bergson, loop unrolled", "bergson, loop unrolled, added up"
MAGIC = "bergson, MAGIC"


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Of one training.

    Attributes:
        influences: [Q, N] by method; of steps too (`is_step`).
        self_influences: [N] by method. A train step's are the query step's: the matrix of an example with itself is
            symmetric. A cosine with itself is always 1.
    """

    influences: dict[str, np.ndarray] = field(default_factory=dict)
    self_influences: dict[str, np.ndarray] = field(default_factory=dict)

    def update(self, other: Predictions) -> None:
        """Takes in what other methods say."""
        self.influences.update(other.influences)
        self.self_influences.update(other.self_influences)

    def write(self, file: Path) -> None:
        parts = {"influences": self.influences, "self_influences": self.self_influences}
        arrays = {f"{part}/{method}": each for part, found in parts.items() for method, each in found.items()}
        partial = file.with_suffix(".partial")
        with partial.open("wb") as stream:
            np.savez(stream, **cast("Any", arrays))
        partial.replace(file)

    @classmethod
    def read(cls, file: Path) -> Predictions:
        found = cls()
        with np.load(file) as arrays:
            for name in arrays.files:
                part, _, method = name.partition("/")
                getattr(found, part)[method] = arrays[name]
        return found


def step_name(resolve: str, step: int, num_steps: int) -> str:
    if resolve == "same_step" and step in (0, num_steps - 1):
        return LAST_STEP if step else FIRST_STEP
    return f"{resolve.replace('_', ' ')} {step}"


def is_step(name: str) -> bool:
    """Whether the method looks at one step alone."""
    return " step " in name
