"""One index's task as the model process runs it: the examples that queries are about, and their sketches.

B examples, S steps, K checkpoints, W width. Task code is the user's, and what it reads may come from the network: a
ValueError out of it is the query's fault, a TaskError or anything else is the task's own.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from loopsway.indexer import ExampleSketcher, GradientSketch, GradientSketcher, Task
from loopsway.indexer.memory import is_out_of_memory
from loopsway.indexer.sketches.weights import WeightMemory

from .frames import Message
from .json_text import value_of

_log = logging.getLogger(__name__)


class QueryError(Exception):
    """One query is refused.

    Attributes:
        kind: "invalid", "precondition" or "unavailable".
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class LoadedTask:
    """One index's task and its sketcher.

    Args:
        name: of the index, for errors.
        task: whose code reads and runs the examples.
        sketcher: of the same task.
        memory: that the sketcher's models are in.
        max_json_depth: as of `Settings`.
    """

    def __init__(
        self, name: str, task: Task, sketcher: ExampleSketcher, memory: WeightMemory, *, max_json_depth: int
    ) -> None:
        self._name, self._task, self._sketcher, self._memory = name, task, sketcher, memory
        self._max_json_depth = max_json_depth
        self._examples = task.examples()

    def close(self) -> None:
        self._sketcher.close()

    def example(self, item: Message) -> Any:
        """The example that a query is about.

        Raises:
            QueryError: the task has none such.
        """
        if "json" in item:
            return self._example_from_json(item["json"])
        row, example_id = item["row"], item.get("id")
        if example_id is not None and not self._is_at(row, example_id):
            row = self._rows.get(example_id)  # an index that was compacted, say, numbers its rows anew
        if row is None or row >= len(self._examples):
            raise QueryError(
                "precondition",
                f"the task's examples changed since index {self._name} was built: {example_id!r} is no longer among "
                "them; rebuild the index or serve the task that it was built from",
            )
        return self._examples[row]

    def begin_gradients(self, num_steps: int) -> GradientSketch:
        """The sketch of a query that comes as gradients."""
        return self._gradient_sketcher.begin(num_steps)

    def sketch(self, examples: Sequence[Any], go_on: Callable[[], object]) -> list[_Sketch | QueryError]:
        """Together; where memory does not suffice, one by one with nothing else loaded."""
        try:
            return self._sketch(examples, go_on)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("out of memory with a batch of %d examples of index %s", len(examples), self._name)
        return [self._sketch_alone(example, go_on) for example in examples]

    def _sketch(self, examples: Sequence[Any], go_on: Callable[[], object]) -> list[_Sketch | QueryError]:
        sketches = self._sketcher.sketch(examples, go_on=go_on)
        values, losses = sketches.values.numpy(), sketches.losses.numpy()  # [B, S, W], [K, B]
        return [
            (values[i], {"losses": losses[:, i].tolist(), "silent": sketches.steps_without_gradient})
            for i in range(len(examples))
        ]

    def _sketch_alone(self, example: Any, go_on: Callable[[], object]) -> _Sketch | QueryError:
        self._memory.clear()
        gc.collect()  # what the failed batch left may be in cycles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        try:
            return self._sketch([example], go_on)[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("out of memory with one example of index %s, alone", self._name)
        return QueryError("unavailable", "the model has too little memory for this query now; ask again later")

    def _example_from_json(self, text: str) -> Any:
        name = type(self._task).__name__
        try:
            obj = value_of(text, self._max_json_depth)
        except ValueError as error:
            raise QueryError("invalid", str(error)) from error
        try:
            return self._task.example_from_json(obj)
        except ValueError as error:
            raise QueryError("invalid", f"not an example of {name}: {error}") from error
        except NotImplementedError as error:
            raise QueryError(
                "precondition",
                f"{name} takes no JSON queries (it defines no example_from_json): ask by example id or sketch",
            ) from error
        except (LookupError, TypeError, AttributeError) as error:
            # Task authors index into the object without checking; the caller still deserves the blame and the hint.
            # The error's text may be the caller's own words, which are not for the log.
            *_, place = traceback.extract_tb(error.__traceback__)
            _log.warning(
                "%s.example_from_json failed without a ValueError: %s at %s:%d",
                *(name, type(error).__name__, place.filename, place.lineno),
            )
            raise QueryError(
                "invalid", f"not an example of {name}: its example_from_json could not read this JSON"
            ) from error

    def _is_at(self, row: int, example_id: str) -> bool:
        return row < len(self._examples) and self._task.example_id(row) == example_id

    @cached_property
    def _gradient_sketcher(self) -> GradientSketcher:
        return self._sketcher.gradient_sketcher()

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {self._task.example_id(row): row for row in range(len(self._examples))}


_Sketch = tuple[np.ndarray, Message]  # [S, W], and what was found out on the way
