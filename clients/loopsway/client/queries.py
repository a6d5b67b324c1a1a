"""What a caller can ask about: an example, an indexed example by its id, or a sketch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from numpy.typing import ArrayLike


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
    """

    values: ArrayLike
    fingerprint: str


Query: TypeAlias = ExampleQuery | IdQuery | SketchQuery
