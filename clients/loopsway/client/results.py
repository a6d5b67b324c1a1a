"""What a server answers, as frozen dataclasses of plain Python values and numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import frames

SIGNIFICANT = 2.0  # standard errors


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """One checkpoint of an index.

    Attributes:
        name: unique in its index.
        learning_rate: the weight of its influences.
        mean_loss: over the index's examples.
    """

    name: str
    learning_rate: float
    mean_loss: float


@dataclass(frozen=True, kw_only=True)
class RefusedGeneration:
    """A newer generation of an index that its server can't answer from.

    Attributes:
        generation: its number. None: it can't be read.
        reason: one sentence; the server's log has more.
    """

    generation: int | None
    reason: str
    refused_at: datetime


@dataclass(frozen=True, kw_only=True)
class IndexInfo:
    """What an index holds and what it can be asked.

    Attributes:
        fingerprint: of the sketches' construction; a `SketchQuery` must carry the same.
        loop_marker: the module whose calls begin a step. None: the body's first module to be entered.
        loop_outside: the last two steps stand for what lies before the first step and after the last.
        generation: the published generation that is served, from 1.
        steps_without_gradient: steps that training runs without a gradient; their influences are 0 by construction.
        recalls: k -> part of the exact top k that the index's search returned when it was built, 0 to 1.
        accepts_examples: False when it is served without its model, and answers sketches only.
        max_gradient_bytes: of one query that comes as gradients; 0 when the index takes none.
        refused: a newer generation that is published, but can't be answered from. None: there is none.
        aliases: other names that requests may ask for it by now.
        server_version: of Loopsway, of the server that answered. None: it is too old to say.
    """

    name: str
    num_examples: int
    num_steps: int
    width: int
    bits: int
    fingerprint: str
    loop_body: tuple[str, ...]
    loop_marker: str | None
    loop_outside: bool
    checkpoints: tuple[CheckpointInfo, ...]
    generation: int
    created_at: datetime
    size_bytes: int
    steps_without_gradient: tuple[int, ...]
    recalls: Mapping[int, float]
    accepts_examples: bool
    max_gradient_bytes: int
    refused: RefusedGeneration | None
    aliases: tuple[str, ...]
    server_version: str | None


@dataclass(frozen=True, kw_only=True)
class QuerySummary:
    """What the server found out about a query.

    Attributes:
        losses: the query's loss at each checkpoint. Empty for a `SketchQuery`.
        steps_without_gradient: its steps that training runs without a gradient. Empty for a `SketchQuery`.
    """

    num_steps: int
    losses: tuple[float, ...]
    steps_without_gradient: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Influencer:
    """One training example and its influence.

    Attributes:
        influence: signed, in units of loss; positive for a proponent.
        standard_error: of the influence, from sketching and coding.
    """

    example_id: str
    description: str
    metadata: Mapping[str, Any]
    influence: float
    standard_error: float

    @property
    def significant(self) -> bool:
        """Whether the influence lies beyond two standard errors of zero."""
        return abs(self.influence) > SIGNIFICANT * self.standard_error


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The strongest proponents and opponents, each strongest first.

    Attributes:
        step: the step they are for. None: the whole loop.
    """

    step: int | None
    proponents: tuple[Influencer, ...]
    opponents: tuple[Influencer, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class InfluencerTrajectories:
    """The influence of every example in a result, step by step.

    Attributes:
        example_ids: n of them, without repeats, in the order in which the rankings name them.
        influences: float32 [n, steps], whichever steps were ranked. Read-only.
        standard_errors: float32 [n, steps]. Read-only.
    """

    example_ids: tuple[str, ...]
    influences: NDArray[np.float32]
    standard_errors: NDArray[np.float32]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`: example_id, step, influence, standard_error."""
        axes = {"example_id": self.example_ids, "step": range(self.influences.shape[1])}
        return frames.steps_frame(axes, self.influences, self.standard_errors)


@dataclass(frozen=True, kw_only=True)
class InfluenceResult:
    """The answer to one query.

    Attributes:
        total: the ranking by TracIn, over the whole loop.
        steps: a ranking for each step asked for, ascending.
        index: the name of the index that answered.
        generation: the generation of it that answered.
        recall: 1 where every stored code was read, else the recall that the build measured of an approximate search.
        coverage: shards of the index that answered, of those that were asked; below 1, this is the answer without the
            examples of those that did not.
        trajectories: of the examples in the rankings, if they were asked for. Not compared.
    """

    query: QuerySummary
    total: Ranking
    steps: tuple[Ranking, ...]
    recall: float
    coverage: float
    index: str
    generation: int
    fingerprint: str
    trajectories: InfluencerTrajectories | None = field(default=None, compare=False)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, a row for each influencer of each ranking.

        Its columns are step (missing: the whole loop), sign ("proponent" or "opponent"), rank, example_id, influence,
        standard_error, significant, description and metadata.NAME.
        """
        return frames.ranked_frame(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreChunk:
    """Examples of consecutive ranks in the ranking at one step, or over the whole loop.

    Attributes:
        step: the step. None: the whole loop.
        first_rank: of the first example here, from 1, the largest influence's.
        example_ids: n of them; none only where a whole ranking is empty.
        influences: float32 [n], signed, the largest first. Read-only.
        standard_errors: float32 [n]. Read-only.
        coverage: as in `InfluenceResult`.
        queries: one for each query, in the first chunk alone.
        index: the name of the index that answers.
        generation: the generation of it that answers.
    """

    step: int | None
    first_rank: int
    example_ids: tuple[str, ...]
    influences: NDArray[np.float32]
    standard_errors: NDArray[np.float32]
    coverage: float
    queries: tuple[QuerySummary, ...]
    index: str
    generation: int
    fingerprint: str

    @property
    def significant(self) -> NDArray[np.bool_]:
        """Bool [n]: whether each influence lies beyond two standard errors of zero."""
        return np.abs(self.influences) > SIGNIFICANT * self.standard_errors

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`: step (missing: the whole loop), rank, example_id, influence, standard_error,
        significant.
        """
        return frames.scores_frame(self)


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """One training example and how alike its gradient is.

    Attributes:
        similarity: a cosine, or an inner product in units of loss.
        standard_error: of the similarity, from sketching and coding.
    """

    example_id: str
    description: str
    metadata: Mapping[str, Any]
    similarity: float
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class ExampleNeighbors:
    """The answer about one training example: those most like it.

    Attributes:
        example_id: that was asked about.
        neighbors: the most alike first.
        coverage: as in `InfluenceResult`.
        index: the name of the index that answered.
        generation: the generation of it that answered.
    """

    example_id: str
    neighbors: tuple[Neighbor, ...]
    coverage: float
    index: str
    generation: int
    fingerprint: str

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`, a row for each neighbor.

        Its columns are example_id (that was asked about), rank, neighbor_id, similarity, standard_error, description
        and metadata.NAME.
        """
        return frames.neighbors_frame(self)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectories:
    """The influence of each asked example on each query, step by step.

    Attributes:
        influences: float32, [queries, examples, steps]; [queries, examples, example's steps, query's steps] for
            "step_matrix". Read-only.
        standard_errors: of the influences; the same shape.
        queries: one for each query.
        example_ids: as they were asked for.
        steps: that the last dimension stands for, ascending: those asked for, or all.
        index: the name of the index that answered.
        generation: the generation of it that answered.
    """

    influences: NDArray[np.float32]
    standard_errors: NDArray[np.float32]
    queries: tuple[QuerySummary, ...]
    example_ids: tuple[str, ...]
    steps: tuple[int, ...]
    index: str
    generation: int
    fingerprint: str

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame`: query (its place), example_id, step, influence, standard_error.

        For "step_matrix" with train_step and query_step instead of step.
        """
        axes: dict[str, Sequence[Any]] = {"query": range(len(self.queries)), "example_id": self.example_ids}
        if self.influences.ndim == 3:
            axes |= {"step": self.steps}
        else:
            axes |= {"train_step": range(self.influences.shape[2]), "query_step": self.steps}
        return frames.steps_frame(axes, self.influences, self.standard_errors)
