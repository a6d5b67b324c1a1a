"""How long each text, and how many of each thing, a request may hold; looked at before anything else is.

The numbers' own ranges are decoding.py's; here is what could make the server work or store without bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from loopsway.v1.tensors import MAX_DIMENSIONS

from .errors import InvalidFieldError
from .settings import Settings

# Of a name, which is one of an index, a checkpoint or a parameter; of a digest in hexadecimal, with room for another.
NAME, FINGERPRINT = 1024, 128


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What one field may hold: numbers, or names of settings.

    Attributes:
        length: of a string, in characters, or of bytes. None where the field is neither.
        count: of a repeated field. None where it is not repeated.
    """

    length: int | str | None = None
    count: int | str | None = None


# A message is no longer than that, as gRPC sees to; to look at the field would copy it.
WHOLE_MESSAGE = Limit(length="max_message_bytes")
_INDEX, _QUERIES, _WHERE = Limit(length=NAME), Limit(count="max_queries"), Limit(length="max_where_characters")
# Every string, bytes and repeated field of requests, by its full name in the package.
LIMITS: dict[str, Limit] = {
    "GetIndexRequest.index": _INDEX,
    "FindInfluencesRequest.index": _INDEX,
    "FindInfluencesRequest.queries": _QUERIES,
    "FindInfluencesRequest.steps": Limit(count="max_steps"),
    "FindInfluencesRequest.where": _WHERE,
    "StreamInfluencesRequest.tag": Limit(length=256),
    "GetTrajectoriesRequest.index": _INDEX,
    "GetTrajectoriesRequest.queries": _QUERIES,
    "GetTrajectoriesRequest.example_ids": Limit(length="max_id_characters", count="max_example_ids"),
    "GetTrajectoriesRequest.steps": Limit(count="max_steps"),
    "ScoreExamplesRequest.index": _INDEX,
    "ScoreExamplesRequest.queries": _QUERIES,
    "ScoreExamplesRequest.steps": Limit(count="max_steps"),
    "ScoreExamplesRequest.where": _WHERE,
    "FindNeighborsRequest.index": _INDEX,
    "FindNeighborsRequest.example_ids": Limit(length="max_id_characters", count="max_queries"),
    "FindNeighborsRequest.where": _WHERE,
    "SketchQueriesRequest.index": _INDEX,
    "SketchQueriesRequest.queries": _QUERIES,
    "ReloadIndexRequest.index": _INDEX,
    "GradientHeader.index": _INDEX,
    "GradientPiece.checkpoint": Limit(length=NAME),
    "GradientPiece.parameter": Limit(length=NAME),
    "GradientEnd.sha256": Limit(length=32),
    "Query.example_json": Limit(length="max_example_characters"),
    "Query.example_id": Limit(length="max_id_characters"),
    "Sketch.fingerprint": Limit(length=FINGERPRINT),
    "Tensor.shape": Limit(count=MAX_DIMENSIONS),
    "Tensor.data": WHOLE_MESSAGE,
}


def check_limits(message: Message, settings: Settings, field: str = "") -> None:
    """Refuses a request with a field that holds too much.

    Args:
        message: the request, or a part of it.
        settings: the limits that vary.
        field: where the part is.

    Raises:
        InvalidFieldError: names the field, its size, and the limit.
    """
    for each in _limited(message.DESCRIPTOR):
        value = getattr(message, each.name)
        if not each.is_repeated:
            _check_one(each, value, message, settings, field)
            continue
        most = _number(each.limit.count, settings)
        if most is not None and len(value) > most:
            where = _within(field, each.name)
            raise InvalidFieldError(f"{len(value)} {each.name}, expected at most {most}", field=where)
        if each.holds_more:
            for i, one in enumerate(value):
                _check_one(each, one, None, settings, field, f"[{i}]")


@dataclass(frozen=True, kw_only=True)
class _Field:
    """A field that can hold too much, itself or within, and its limit.

    Attributes:
        holds_more: text, bytes, or a message.
        is_message: the last of these.
    """

    name: str
    limit: Limit
    is_repeated: bool
    holds_more: bool
    is_message: bool


def _check_one(
    own: _Field, value: Any, parent: Message | None, settings: Settings, field: str, place: str = ""
) -> None:
    """Looks at a value of a field; of one that is not repeated `parent` tells whether it is there."""
    if own.is_message:
        if parent is None or parent.HasField(own.name):
            check_limits(value, settings, _within(field, own.name) + place)
        return
    most = _number(own.limit.length, settings)
    if most is not None and len(value) > most:
        unit, where = "characters" if isinstance(value, str) else "bytes", _within(field, own.name) + place
        raise InvalidFieldError(f"{where} has {len(value)} {unit}, expected at most {most}", field=where)


def _within(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


_TEXT = (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_BYTES)
_MESSAGES = (FieldDescriptor.TYPE_MESSAGE, FieldDescriptor.TYPE_GROUP)


@cache
def _limited(message: Descriptor) -> tuple[_Field, ...]:
    """The fields that can hold too much, themselves or within."""
    fields = []
    for field in message.fields:
        limit, holds_more = LIMITS.get(name_of(field), Limit()), field.type in (*_TEXT, *_MESSAGES)
        if limit is not WHOLE_MESSAGE and (field.is_repeated or holds_more):
            fields.append(
                _Field(
                    name=field.name,
                    limit=limit,
                    is_repeated=field.is_repeated,
                    holds_more=holds_more,
                    is_message=field.type in _MESSAGES,
                )
            )
    return tuple(fields)


def name_of(field: FieldDescriptor) -> str:
    """A field's name in `LIMITS`."""
    message = field.containing_type
    assert message is not None
    return f"{message.name}.{field.name}"


def _number(limit: int | str | None, settings: Settings) -> int | None:
    return getattr(settings, limit) if isinstance(limit, str) else limit
