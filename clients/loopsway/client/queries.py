"""What a caller can ask about: an example, an indexed example by its id, or a sketch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from numpy.typing import ArrayLike

from .results import QuerySummary


@dataclass(frozen=True)
class ExampleQuery:
    """An example that the server's model runs on.

    Attributes:
        example: anything that `json.dumps` takes; the index's task reads it (its `example_from_json`).
    """

    example: Any


@dataclass(frozen=True)
class IdQuery:
    """An indexed example, that the server's model runs on again."""

    example_id: str


@dataclass(frozen=True, eq=False)
class SketchQuery:
    """A sketch made by the caller, such as with `loopsway.indexer.ExampleSketcher`; costs the server no model call.

    Attributes:
        values: [steps, width], sent as float32.
        fingerprint: of the construction that made it; must be the index's own.
        summary: what the server found out about the query that it made this of. None: it made it of none.
    """

    values: ArrayLike
    fingerprint: str
    summary: QuerySummary | None = None


Query: TypeAlias = ExampleQuery | IdQuery | SketchQuery
