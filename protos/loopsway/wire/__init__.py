"""A query's gradients as numpy arrays: what the indexer makes of a model's backward pass, and what a client sends.

T terms of a sum (tokens), I inputs, O outputs, D features. Knows neither torch nor gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["DenseGradient", "FactoredGradient", "GradientPiece", "QueryGradients", "RowGradient"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseGradient:
    """Entries of one parameter's gradient at one step, as they are.

    Attributes:
        checkpoint: its name, as the index has it.
        parameter: its name in the model.
        step: from 0; with Loop(outside=True), the last two are `before` and `after`.
        values: consecutive entries, row-major; of any shape.
        start: the place of the first of them in the flattened parameter.
    """

    checkpoint: str
    parameter: str
    step: int
    values: NDArray[Any]
    start: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class FactoredGradient:
    """The gradient sum_t g_t a_t^T of a weight [O, I] at one step, not multiplied out.

    Attributes:
        checkpoint: as in `DenseGradient`.
        parameter: as in `DenseGradient`.
        step: as in `DenseGradient`.
        output_gradients: the g_t, [T, O].
        inputs: the a_t, [T, I].
    """

    checkpoint: str
    parameter: str
    step: int
    output_gradients: NDArray[Any]
    inputs: NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class RowGradient:
    """The gradient of a table [V, D] at one step, zero but at some rows.

    Attributes:
        checkpoint: as in `DenseGradient`.
        parameter: as in `DenseGradient`.
        step: as in `DenseGradient`.
        rows: int64 [T]; what comes more than once adds up.
        values: [T, D].
    """

    checkpoint: str
    parameter: str
    step: int
    rows: NDArray[np.int64]
    values: NDArray[Any]


GradientPiece: TypeAlias = DenseGradient | FactoredGradient | RowGradient


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryGradients:
    """The gradients of one query's loss with respect to an index's parameters, before the learning rate.

    Attributes:
        num_steps: the query's, with Loop(outside=True) two more.
        pieces: in any order; those of one checkpoint, parameter and step add up, and what none names is zero.
    """

    num_steps: int
    pieces: tuple[GradientPiece, ...]
