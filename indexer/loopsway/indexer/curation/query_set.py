"""Query sets of any size: sketches that are there, or examples that are sketched as they are asked for."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..gradients.losses import NonFiniteError
from ..search.contents import UnknownExampleError
from ..search.index import Index
from ..search.queries import checked_sketches
from ..sketches.features import ExampleSketcher
from ..store.files import bytes_digest
from ..task import Task


class QuerySet(ABC):
    """Q queries in an order that never changes.

    Attributes:
        ids: what each is called, Q of them.
        digest: of what makes them what they are; a job that was cut goes on only with an equal set.
    """

    ids: Sequence[str]
    digest: str

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def sketches(self, queries: range) -> np.ndarray:
        """Sketches of some of them, float32 [n, T, W].

        Raises:
            ValueError: one of them can't be sketched; the text names it.
        """


class SketchedQueries(QuerySet):
    """Queries that come as sketches.

    Args:
        sketches: float32 [Q, T, W] or [T, W], as ExampleSketcher and StepSketcher give them; or the path of a .npy file
            of them, which is read as it is needed.
        width: of the index.

    Raises:
        ValueError: the shape, or values that are not finite.
    """

    def __init__(self, sketches: Any, width: int) -> None:
        if isinstance(sketches, str | Path):
            try:
                sketches = np.load(sketches, mmap_mode="r", allow_pickle=False)
            except (ValueError, EOFError) as error:
                raise ValueError(f"{sketches} is not a .npy file of numbers: {error}") from error
        values = np.asanyarray(sketches)
        values = values[None] if values.ndim == 2 else values
        checked_sketches(values[:1], width)
        self._values, self._width = values, width
        self.ids = [str(query) for query in range(len(values))]
        digest = hashlib.blake2b(repr((values.shape, values.dtype.str)).encode(), digest_size=16)
        for query in values:
            digest.update(np.ascontiguousarray(query).data)
        self.digest = digest.hexdigest()

    def sketches(self, queries: range) -> np.ndarray:
        return checked_sketches(np.array(self._values[queries.start : queries.stop]), self._width)[0]


class ExampleQueries(QuerySet):
    """Examples of a task, sketched when they are asked for.

    Args:
        sketcher: of the task's examples.
        examples: with `len()` and `[i]`.
        ids: of the examples.
        digest: of what they are.
    """

    def __init__(self, sketcher: ExampleSketcher, examples: Sequence[Any], ids: Sequence[str], digest: str) -> None:
        self._sketcher, self._examples = sketcher, examples
        self.ids, self.digest = ids, digest

    def sketches(self, queries: range) -> np.ndarray:
        try:
            return self._sketcher.sketch([self._examples[query] for query in queries]).values.numpy()
        except NonFiniteError as error:
            bad = ", ".join(self.ids[queries[place]] for place in error.positions[:8])
            raise ValueError(f"query {bad} has no sketch: {error.reason}; leave it out") from error

    @classmethod
    def from_jsonl(cls, file: str | Path, task: Task, sketcher: ExampleSketcher) -> ExampleQueries:
        """A query for each line of a file, in the JSON that the task reads; its id is the line's number, from 1.

        Raises:
            ValueError: a line is no JSON, or the task refuses it; or there is none.
        """
        content = Path(file).read_bytes()
        examples, ids = [], []
        for number, line in enumerate(content.decode("utf-8").splitlines(), 1):
            if line.strip():
                try:
                    examples.append(task.example_from_json(json.loads(line)))
                except (ValueError, TypeError, LookupError, AttributeError) as error:  # tasks check their input or not
                    raise ValueError(f"{file}, line {number}: {error}") from error
                ids.append(str(number))
        if not examples:
            raise ValueError(f"{file} has no queries; write one JSON document on each line")
        return cls(sketcher, examples, ids, bytes_digest(content))

    @classmethod
    def from_ids(cls, ids: Sequence[str], index: Index, task: Task, sketcher: ExampleSketcher) -> ExampleQueries:
        """Indexed examples, sketched again: a stored code beside a stored code would overrate what is alike.

        Raises:
            UnknownExampleError: an id is not in the index, or not among the task's examples.
            ValueError: there is none.
        """
        if not ids:
            raise ValueError("no ids to ask about; give at least one")
        examples = task.examples()
        rows = {task.example_id(row): row for row in range(len(examples))}
        for example_id in ids:
            index.row_of(example_id)
            if example_id not in rows:
                raise UnknownExampleError(f"example {example_id!r} is in the index, but not among the task's examples")
        digest = bytes_digest("\0".join(ids).encode())
        return cls(sketcher, [examples[rows[example_id]] for example_id in ids], list(ids), digest)
