"""Passages of text for a causal language model: lines of a JSONL file, and the JSON of a query, checked and named.

Knows no tokens. A passage is a prompt and its completion; plain text is a completion without a prompt.
"""

from __future__ import annotations

import json
import logging
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loopsway.indexer.task import TaskError

QUERY_KEYS = frozenset({"prompt", "completion", "text", "answer_only", "position"})
EXPECTED = '{"prompt": "...", "completion": "..."} or {"text": "..."}'
MAX_DESCRIPTION = 160  # characters of each side

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A prompt, empty for plain text, and what follows it."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        return self.prompt + self.completion

    def describe(self) -> str:
        """One line."""
        sides = [_one_line(side) for side in (self.prompt, self.completion)]
        return " -> ".join(side for side in sides if side)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of the data hold what.

    Attributes:
        prompt, completion: used together.
        text: used in rows without them.
        separator: put between a prompt and its completion, as part of the prompt; also in queries.
    """

    prompt: str = "prompt"
    completion: str = "completion"
    text: str = "text"
    separator: str = ""

    def passage(self, row: Mapping[str, Any]) -> Passage:
        """The row's passage.

        Raises:
            ValueError: it has neither columns, or they hold no text.
        """
        if self.prompt in row and self.completion in row:
            prompt, completion = (_text(row[name], name) for name in (self.prompt, self.completion))
            return Passage(prompt=prompt + self.separator, completion=completion)
        if self.text in row:
            return Passage(prompt="", completion=_text(row[self.text], self.text))
        raise ValueError(
            f"it has neither {self.prompt!r} and {self.completion!r} nor {self.text!r}, but {reprlib.repr(list(row))}"
        )


@dataclass(frozen=True, kw_only=True)
class Query:
    """What a query's JSON asks for.

    Attributes:
        answer_only: whether the completion's tokens alone count. None: as the task does.
        position: the one token whose loss counts. None: all that `answer_only` says.
    """

    passage: Passage
    answer_only: bool | None
    position: int | None


def read_query(obj: Any, separator: str) -> Query:
    """The query of untrusted JSON.

    Raises:
        ValueError: it is none; the text says why.
    """
    if not isinstance(obj, dict):
        raise ValueError(f"an example is an object, {EXPECTED}; got {type(obj).__name__} {reprlib.repr(obj)}")
    if unknown := sorted(map(str, set(obj) - QUERY_KEYS)):
        raise ValueError(f"an example is {EXPECTED}; it may not have the keys {reprlib.repr(unknown)}")
    if ("text" in obj) == bool({"prompt", "completion"} & set(obj)) or ("prompt" in obj) != ("completion" in obj):
        raise ValueError(f"an example is {EXPECTED}, one of the two; got the keys {sorted(obj)}")
    answer_only, position = obj.get("answer_only"), obj.get("position")
    if "answer_only" in obj and not isinstance(answer_only, bool):
        raise ValueError(f'"answer_only" must be true or false; got {type(answer_only).__name__}')
    if "position" in obj and (not isinstance(position, int) or isinstance(position, bool)):
        raise ValueError(f'"position" must be a whole number, that of a token; got {type(position).__name__}')
    if answer_only is not None and position is not None:
        raise ValueError('"position" names the one token that counts: leave "answer_only" out')
    if answer_only and "text" in obj:
        raise ValueError('"answer_only" needs a "prompt" and a "completion"; "text" has no answer of its own')
    return Query(passage=Columns(separator=separator).passage(obj), answer_only=answer_only, position=position)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All passages of a file, and each row's further columns: the same for every row, each of one scalar type."""

    passages: list[Passage]
    columns: list[dict[str, Any]]

    @classmethod
    def read(cls, file: Path, columns: Columns) -> Rows:
        """The rows of a JSONL file; empty lines are passed over.

        Raises:
            TaskError: the file is missing, or a line is no passage; the line is named.
        """
        rows: list[dict[str, Any]] = []
        passages: list[Passage] = []
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"it is no object but {type(row).__name__}")
                passages.append(columns.passage(row))
            except ValueError as error:
                raise TaskError(
                    f"line {number} of {file} is no example: {error}. A line is {EXPECTED}; other names of columns are "
                    "given as prompt_column, completion_column and text_column"
                ) from error
            rows.append(row)
        if not rows:
            raise TaskError(f"{file} holds no examples")
        return cls(passages=passages, columns=_scalar_columns(rows, {columns.prompt, columns.completion, columns.text}))


def _lines(file: Path) -> Iterable[str]:
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"the examples in {file} can't be read: {error}") from error


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be text; got {type(value).__name__} {reprlib.repr(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} holds half of a surrogate pair, which is no character") from None
    return value


def _scalar_columns(rows: Sequence[Mapping[str, Any]], taken: set[str]) -> list[dict[str, Any]]:
    """Each row's columns that hold one type of scalar, None where a row has no value; the others are logged."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in taken]
    kinds = {name: {type(row[name]) for row in rows if row.get(name) is not None} for name in names}
    numbers = {name for name in names if kinds[name] == {int, float}}
    kept = [name for name in names if name in numbers or (len(kinds[name]) == 1 and kinds[name] <= _SCALARS)]
    if left_out := sorted(name for name in names if name not in kept and kinds[name]):
        _log.info("columns that are no scalars of one type are not kept as metadata: %s", ", ".join(left_out))
    return [
        {name: float(row[name]) if name in numbers and name in row else row.get(name) for name in kept} for row in rows
    ]


_SCALARS = {str, int, float, bool}


def _one_line(text: str) -> str:
    words = " ".join(text[: 4 * MAX_DESCRIPTION].split())
    shown = len(words) <= MAX_DESCRIPTION and len(text) <= 4 * MAX_DESCRIPTION
    return words if shown else words[: MAX_DESCRIPTION - 1].rstrip() + "…"
