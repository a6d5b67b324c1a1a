"""Strategies for encoded calls: good ones whose messages have other values, or whose bytes are damaged.

Knows the messages by their descriptors alone. Shrinks towards the first good call, unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

Call = Sequence[Message]  # those that it streams, or the one
UNKNOWN = [  # fields that no message has
    *(b"\xf8\x3f\x05", b"\xf9\x3f" + b"\xff" * 8, b"\xfa\x3f\x03abc", b"\xfb\x3f\xfb\x3f\xfc\x3f\xfc\x3f"),
    b"\xfa\x3f\x80\x20" + b"x" * 4096,
]


def whole_numbers(bits: int, *, signed: bool) -> st.SearchStrategy[int]:
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    telling = [each for each in (0, 1, 2, 3, -1, 1000, most, least) if least <= each]
    return st.sampled_from(telling) | st.integers(least, most)


VALUES: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_ENUM: st.integers(-1, 5) | st.sampled_from([2**31 - 1, -(2**31)]),
    FieldDescriptor.CPPTYPE_INT32: whole_numbers(32, signed=True),
    FieldDescriptor.CPPTYPE_INT64: whole_numbers(64, signed=True),
    FieldDescriptor.CPPTYPE_UINT32: whole_numbers(32, signed=False),
    FieldDescriptor.CPPTYPE_UINT64: whole_numbers(64, signed=False),
    FieldDescriptor.CPPTYPE_DOUBLE: st.sampled_from([0.0, 1.0, -1.0, 1e300, 5e-324, float("nan"), float("inf")])
    | st.floats(),
    FieldDescriptor.CPPTYPE_FLOAT: st.floats(width=32),
}
TEXTS = st.sampled_from(
    [
        *("", "tiny", "tiny-0", "\0", "ü" * 5000, "\u202e"),
        *("id == 'x'", "((((", "not " * 2400 + "id", '{"tokens": "\\ud800"}', "[" * 200, '{"tokens": [1e999]}'),
    ]
) | st.text(max_size=20)
BYTES = st.sampled_from([b"", b"\0" * 7, b"\xff" * 4096]) | st.binary(max_size=16)


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.type == FieldDescriptor.TYPE_BYTES:
        return BYTES
    return VALUES.get(field.cpp_type, TEXTS)


@cache
def chosen(values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


def change(draw: st.DrawFn, message: Message) -> None:
    """Gives one field, at any depth, another value, or the message an unknown field."""
    fields = tuple(message.DESCRIPTOR.fields)
    field = draw(chosen((None, *fields, *fields)))
    if field is None:
        message.MergeFromString(draw(chosen(tuple(UNKNOWN))))
    elif field.is_repeated:
        change_items(draw, field, getattr(message, field.name))
    elif field.message_type is None:
        setattr(message, field.name, draw(values(field)))
    else:
        inner = getattr(message, field.name)
        inner.SetInParent()  # where others of its oneof are set, instead of them
        change(draw, inner)


def change_items(draw: st.DrawFn, field: FieldDescriptor, items: Any) -> None:
    """Changes an item, or adds some, or leaves some out."""
    what = draw(chosen(("change", "change", "add", "repeat", "drop")))
    if what == "drop":
        del items[draw(chosen((0, 1))) :]
    elif what == "repeat":
        items.extend(list(items) * draw(chosen((1, 30))))
    elif field.message_type is not None:
        change(draw, items[drawn_index(draw, items)] if items and what == "change" else items.add())
    elif items and what == "change":
        items[drawn_index(draw, items)] = draw(values(field))
    else:
        items.extend([draw(values(field))] * draw(chosen((1, 20))))


def damage(draw: st.DrawFn, data: bytearray) -> None:
    """Flips a bit, cuts some bytes out, inserts some, or doubles some."""
    kind, place = draw(chosen(("flip", "cut", "insert", "double"))), draw(st.integers(0, len(data)))
    if kind == "flip" and place < len(data):
        data[place] ^= draw(chosen((1, 2, 4, 8, 16, 32, 64, 128)))
    elif kind == "cut":
        del data[place : place + draw(chosen((1, 2, 16, 4096)))]
    elif kind == "insert":
        data[place:place] = draw(st.binary(min_size=1, max_size=16))
    else:
        data[place:place] = data[: draw(st.integers(1, 64))]


@st.composite
def damaged(draw: st.DrawFn, good: Message) -> bytes:
    """The message in bytes, with up to two changes of its fields and as many damages of its bytes."""
    message = type(good)()
    message.CopyFrom(good)
    for _ in range(draw(chosen((0, 1, 1, 2)))):
        change(draw, message)
    data = bytearray(message.SerializeToString())
    for _ in range(draw(chosen((0, 0, 1, 2)))):
        damage(draw, data)
    return bytes(data)


@st.composite
def calls(draw: st.DrawFn, goods: Sequence[Call]) -> list[bytes]:
    """The messages of a call, encoded, one of them damaged: if all were, what is behind the first would not be met."""
    good = goods[drawn_index(draw, goods)]
    place = drawn_index(draw, good)
    return [draw(damaged(each)) if i == place else each.SerializeToString() for i, each in enumerate(good)]


def drawn_index(draw: st.DrawFn, items: Any) -> int:
    return draw(chosen(tuple(range(len(items))))) if len(items) > 1 else 0
