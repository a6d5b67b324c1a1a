"""What the page asks, as calls of the client."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from loopsway.client import (
    AsyncClient,
    ExampleNeighbors,
    IndexInfo,
    Influencer,
    InfluenceResult,
    Query,
    SketchQuery,
    Trajectories,
)

from .questions import DrawQuestion, ExampleQuestion, InfluenceQuestion

DRAWN = 6
NEIGHBORS = 5
KEPT_SKETCHES = 8


@dataclass(frozen=True, kw_only=True)
class OneExample:
    """What the server says about one training example.

    Attributes:
        shown: its text and metadata, with its influence over the whole loop. None: that is exactly zero, or the
            example's part of the index did not answer.
        trajectory: of its influence on the query.
        matrix: the same, for each step of the example.
        neighbors: the examples with gradients most like its own.
    """

    shown: Influencer | None
    trajectory: Trajectories
    matrix: Trajectories
    neighbors: ExampleNeighbors


class Asker:
    """Asks one server. It keeps the sketches of the latest queries: looking closer costs no further model call."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._sketches: OrderedDict[tuple[str, str], SketchQuery] = OrderedDict()

    async def indices(self) -> list[IndexInfo]:
        return await self._client.list_indices()

    async def draw(self, question: DrawQuestion) -> tuple[Influencer, ...]:
        """Some training examples: those that a random sketch happens to rank first, as no method lists them."""
        info = await self._client.get_index(question.index)
        sketch = _random_sketch(info, question.seed)
        (result,) = await self._client.find_influences(
            [sketch], k=DRAWN, steps=[0], where=question.where, index=question.index
        )
        return result.total.proponents

    async def influences(self, question: InfluenceQuestion) -> InfluenceResult:
        """The rankings, and the trajectories of every example in them."""
        # Sketched anew: the index may have been replaced since. The service puts the two calls' queries in one batch.
        _, (result,) = await asyncio.gather(
            self._new_sketch(question.index, question.query),
            self._client.find_influences(
                [question.query],
                k=question.k,
                resolve=question.resolve,
                where=question.where,
                trajectories=True,
                index=question.index,
            ),
        )
        return result

    async def example(self, question: ExampleQuestion) -> OneExample:
        """All about one training example."""
        sketch = await self._sketch(question.index, question.query)
        ids, index = [question.example_id], question.index
        shown, trajectory, matrix, neighbors = await asyncio.gather(
            self._shown(question, sketch),
            self._client.get_trajectories([sketch], ids, resolve=question.resolve, index=index),
            self._client.get_trajectories([sketch], ids, resolve="step_matrix", index=index),
            self._neighbors(question),
        )
        return OneExample(shown=shown, trajectory=trajectory, matrix=matrix, neighbors=neighbors)

    async def _shown(self, question: ExampleQuestion, sketch: SketchQuery) -> Influencer | None:
        """The example's text and metadata, which come with rankings alone: the ranking within a filter for its id."""
        where = f"id == {question.example_id!r}"
        (result,) = await self._client.find_influences([sketch], k=1, steps=[0], where=where, index=question.index)
        return next(iter((*result.total.proponents, *result.total.opponents)), None)

    async def _neighbors(self, question: ExampleQuestion) -> ExampleNeighbors:
        (found,) = await self._client.find_neighbors([question.example_id], k=NEIGHBORS, index=question.index)
        return found

    async def _sketch(self, index: str, query: Query) -> SketchQuery:
        return self._sketches.get((index, repr(query))) or await self._new_sketch(index, query)

    async def _new_sketch(self, index: str, query: Query) -> SketchQuery:
        (sketch,) = await self._client.sketch_queries([query], index=index)
        self._sketches[index, repr(query)] = sketch
        self._sketches.move_to_end((index, repr(query)))
        if len(self._sketches) > KEPT_SKETCHES:
            self._sketches.popitem(last=False)
        return sketch


def _random_sketch(info: IndexInfo, seed: int) -> SketchQuery:
    values: Any = np.random.default_rng(seed).standard_normal((1, info.width), dtype=np.float32)
    return SketchQuery(values, info.fingerprint)
