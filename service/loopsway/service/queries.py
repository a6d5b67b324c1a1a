"""A query as the engine sees it: decoded, but not yet resolved into a sketch; and what it becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class ExampleQuery:
    """An example to run the model on.

    Attributes:
        text: JSON, as it came; what it says is for the task's example_from_json.
        field: where the request holds it, for errors.
    """

    text: str
    field: str


@dataclass(frozen=True, kw_only=True)
class IdQuery:
    """An indexed example to run the model on again.

    Attributes:
        field: where the request holds it, for errors.
    """

    example_id: str
    field: str


@dataclass(frozen=True, kw_only=True, eq=False)
class SketchQuery:
    """A sketch that came with the request, checked against the index.

    Attributes:
        values: float32 [S, W], finite.
    """

    values: NDArray[np.float32]


Query: TypeAlias = ExampleQuery | IdQuery | SketchQuery


@dataclass(frozen=True, kw_only=True, eq=False)
class ResolvedQuery:
    """A query's sketch and what was found out on the way.

    Attributes:
        sketch: float32 [S, W].
        losses: at each checkpoint; empty when no model ran.
        steps_without_gradient: of the query; empty when no model ran.
    """

    sketch: NDArray[np.float32]
    losses: tuple[float, ...] = ()
    steps_without_gradient: tuple[int, ...] = ()

    @property
    def num_steps(self) -> int:
        return len(self.sketch)
