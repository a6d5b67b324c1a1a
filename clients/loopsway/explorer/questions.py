"""What the page asks, read from the bodies of its requests.

What only the gRPC server can judge (names, ranges, filters) is left to it, so that there is one judge.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from loopsway.client import ExampleQuery, IdQuery, InvalidQueryError, Query

_Value = TypeVar("_Value", str, int)


@dataclass(frozen=True, kw_only=True)
class DrawQuestion:
    """Some training examples, of an index and within a filter; another seed gives others."""

    index: str
    where: str
    seed: int

    @staticmethod
    def read(body: bytes) -> DrawQuestion:
        document = _document(body)
        seed = _get(document, "seed", int, 0)
        if seed < 0:
            raise InvalidQueryError(f"seed is {seed}, expected 0 or more", field="seed")
        return DrawQuestion(index=_get(document, "index", str, ""), where=_get(document, "where", str, ""), seed=seed)


@dataclass(frozen=True, kw_only=True)
class InfluenceQuestion:
    """Who shaped the answer to a query.

    Attributes:
        resolve: as the client's; it judges.
    """

    index: str
    query: Query
    resolve: Any
    k: int
    where: str

    @staticmethod
    def read(body: bytes) -> InfluenceQuestion:
        document = _document(body)
        return InfluenceQuestion(
            index=_get(document, "index", str, ""),
            query=_query(document),
            resolve=_get(document, "resolve", str, "query_step"),
            k=_get(document, "k", int, 10),
            where=_get(document, "where", str, ""),
        )


@dataclass(frozen=True, kw_only=True)
class ExampleQuestion:
    """All about one training example, and its influence on a query."""

    index: str
    query: Query
    resolve: Any
    example_id: str

    @staticmethod
    def read(body: bytes) -> ExampleQuestion:
        document = _document(body)
        return ExampleQuestion(
            index=_get(document, "index", str, ""),
            query=_query(document),
            resolve=_get(document, "resolve", str, "query_step"),
            example_id=_get(document, "example_id", str, ""),
        )


def _document(body: bytes) -> dict[str, Any]:
    document = _json(body.decode("utf-8", "replace"), "body")
    if not isinstance(document, dict):
        raise InvalidQueryError("the body is no JSON object", field="body")
    return cast("dict[str, Any]", document)


def _query(document: dict[str, Any]) -> Query:
    """{"example": JSON text} or {"id": text}: the example is text, so that no number in it passes through a browser."""
    query = document.get("query")
    if isinstance(query, dict):
        query = cast("dict[str, Any]", query)
        if "id" in query:
            return IdQuery(_get(query, "id", str, ""))
        if "example" in query:
            return ExampleQuery(_json(_get(query, "example", str, ""), "query"))
    raise InvalidQueryError('query is missing, expected {"example": JSON text} or {"id": text}', field="query")


def _json(text: str, field: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidQueryError(f"not JSON: {error.msg} at character {error.pos + 1}", field=field) from error
    except (RecursionError, ValueError) as error:  # too deep; a number of too many digits
        raise InvalidQueryError(f"not JSON that can be read: {error}", field=field) from error


def _get(document: dict[str, Any], name: str, kind: type[_Value], default: _Value) -> _Value:
    value = document.get(name, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = "text" if kind is str else "a whole number"
        raise InvalidQueryError(f"{name} is {str(value)[:80]!r}, expected {expected}", field=name)
    return value
