"""What is noted of a request while it is answered: its id, whose it is, what it asks, and how long each part takes.

Whoever does a part says so with `part`; observation.py reads the record at the end. Knows no gRPC, no logs, no metrics.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

PartName: TypeAlias = Literal["queue", "sketch", "search", "encode"]
OnPart: TypeAlias = Callable[["Record", PartName, int, int], object]
OnBatch: TypeAlias = Callable[["Record"], object]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")


@dataclass(kw_only=True, eq=False)
class Record:
    """One request, or one batch of a stream.

    Attributes:
        method: a name that the server knows.
        request_id: the caller's, or made here.
        on_part: is told each part with its beginning and end, by `time.monotonic_ns()`.
        on_batch: is told each batch of a stream at its end.
        metadata: that the caller sent, as far as it is text.
        index: that it is answered from, by its own name and not the caller's; "" where it came to none, or a stream's
            batches came to several.
        token: the name of the caller's token; "" for none.
        num_queries: or examples, over all batches of a stream.
        request_bytes: of its messages.
        response_bytes: of its answers.
        refused_field: of the request that it was refused for.
        code: the gRPC status, by name.
        span: of tracing.py. None: it is not traced.
        seconds: of each part; batches of a stream are answered side by side, so that these may be more than it took.
        num_batches: of a stream, that came to their end.
        num_failed_batches: of them.
        start_ns: when it came, by `time.monotonic_ns()`.
    """

    method: str
    request_id: str
    on_part: OnPart
    on_batch: OnBatch
    metadata: Mapping[str, str] = field(default_factory=dict)
    index: str = ""
    token: str = ""
    num_queries: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    refused_field: str = ""
    code: str = "CANCELLED"  # unless it comes to an end of its own
    span: Any = None
    seconds: dict[PartName, float] = field(default_factory=dict)
    num_batches: int = 0
    num_failed_batches: int = 0
    start_ns: int = field(default_factory=time.monotonic_ns)

    def add(self, batch: Record) -> None:
        """Takes in what was noted of one of its batches."""
        if not self.num_batches:
            self.index = batch.index
        elif batch.index != self.index:
            self.index = ""
        self.num_batches += 1
        self.num_failed_batches += batch.code != "OK"
        self.num_queries += batch.num_queries
        for name, seconds in batch.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


# Of the request that the present asyncio task answers. None: what is done is no request's, as in a warm-up.
RECORD: ContextVar[Record | None] = ContextVar("record", default=None)


def note(*, index: str = "", token: str = "", refused_field: str = "", num_queries: int = 0) -> None:
    """Notes what is found out of the request under way; queries add up."""
    record = RECORD.get()
    if record is not None:
        record.index, record.token = index or record.index, token or record.token
        record.refused_field = refused_field or record.refused_field
        record.num_queries += num_queries


@contextmanager
def batch() -> Iterator[Record]:
    """What is done in here is a batch of the stream under way, whose index and code are its own: so is its record."""
    stream = RECORD.get()
    assert stream is not None, "each stream is a request, which observation.py begins"
    own = Record(
        method=stream.method,
        request_id=stream.request_id,
        on_part=stream.on_part,
        on_batch=stream.on_batch,
        token=stream.token,
        span=stream.span,
    )
    token = RECORD.set(own)
    try:
        yield own
    finally:
        RECORD.reset(token)
        stream.add(own)
        stream.on_batch(own)


class Passage:
    """A stretch of a request's time that begins as one part and may become another, told from any thread."""

    def __init__(self, name: PartName) -> None:
        self._marks: list[tuple[PartName, int]] = [(name, time.monotonic_ns())]

    def becomes(self, name: PartName) -> None:
        if self._marks[-1][0] != name:
            self._marks.append((name, time.monotonic_ns()))

    def parts(self) -> Iterator[tuple[PartName, int, int]]:
        """Each part until now with its beginning and end."""
        marks = list(self._marks)
        ends = [*(start for _, start in marks[1:]), time.monotonic_ns()]
        for (name, start), end in zip(marks, ends, strict=True):
            yield name, start, end


_PASSAGE: ContextVar[Passage | None] = ContextVar("passage", default=None)  # under way


@contextmanager
def part(name: PartName) -> Iterator[Passage]:
    """What is done in here is this part of the request under way."""
    passage, record = Passage(name), RECORD.get()
    token = _PASSAGE.set(passage)
    try:
        yield passage
    finally:
        _PASSAGE.reset(token)
        if record is not None:
            for found, start, end in passage.parts():
                record.seconds[found] = record.seconds.get(found, 0.0) + (end - start) / 1e9
                record.on_part(record, found, start, end)


def goes_on_as(name: PartName) -> None:
    """What is done in the present part from now on is this one, in whichever thread it is done."""
    if (passage := _PASSAGE.get()) is not None:
        passage.becomes(name)


def request_id_from(given: str | None) -> str:
    """The caller's id if it is one, else a new one: an id stands in logs, and must not break them."""
    return given if given is not None and _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
