"""What is wrong with settings, in words: the key, the value seen, what was expected, the keys there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


class SettingsError(ValueError):
    """Settings that no server can be run with; the text has a line for each fault."""


def settings_error(error: ValidationError, settings: type[BaseModel]) -> SettingsError:
    """The error that says what pydantic found."""
    return SettingsError("\n".join(_said(fault, settings) for fault in error.errors(include_url=False)))


def _said(fault: Any, settings: type[BaseModel]) -> str:
    """What is wrong with one setting. Values of tables are not shown, as they may be secrets."""
    path = fault["loc"]
    name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    if fault["type"] == "extra_forbidden":
        table = _table_at(path[:-1], settings)
        where = "" if len(path) == 1 else f" of {name.rpartition('.')[0]}"
        return f"{name} is no setting; the settings{where} are {', '.join(table.model_fields)}"
    reason = fault["msg"].removeprefix("Value error, ")
    reason = reason.replace("Input should be", "expected").replace("Field required", "missing, expected a value")
    shown = (
        f"{name} is {fault['input']!r}" if len(path) == 1 and isinstance(fault["input"], int | float | str) else name
    )
    separator = ", " if shown != name else ": "
    return f"{shown}{separator}{reason}" if name else reason


def _table_at(path: tuple[int | str, ...], settings: type[BaseModel]) -> type[BaseModel]:
    """The class of the table that a key stands in."""
    table = settings
    for part in path:
        if isinstance(part, str):
            table = next(iter(_tables(table.model_fields[part].annotation)), table)
    return table


def _tables(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _tables(argument)
