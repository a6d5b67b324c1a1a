"""Filters over examples: a small expression language, parsed and never run.

    source == "gsm8k" and 10 <= length < 200 and not (label in ["a", "b"] or note is None)

Names are the metadata's columns, `id` and `description`. Python's own parser reads the text; what is not a comparison,
`in` a list of values, `is None`, `and`, `or`, `not`, a bool column or a value is refused. As in SQL, a comparison with
a missing value is neither true nor false, and neither is its `not`: such a row does not match.
"""

from __future__ import annotations

import ast
import operator
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import acero

MOST_CHARACTERS = 10_000
_PARSING = threading.Lock()  # CPython counts one depth for all threads, and raises SystemError where they meet

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_EXPECTED = "expected comparisons of columns with values, `in`, `is None`, `and`, `or`, `not`"


class FilterError(ValueError):
    """A filter can't be read, or does not fit the columns."""


def matching_rows(table: pa.Table, text: str) -> np.ndarray:
    """Which rows of an examples' table a filter matches, bool [N].

    Args:
        table: with the columns `id`, `description` and, if there is any, `metadata`.
        text: the filter.

    Raises:
        FilterError: the text can't be read, names no column, or compares what can't be compared; it says where.
    """
    flat = _flat(table)
    try:
        expression = _Reader(text, flat.schema).read()
        return _mask(flat, expression)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise FilterError(f"filter {text!r} does not fit the columns {_columns(flat.schema)}: {reason}") from error


def _flat(table: pa.Table) -> pa.Table:
    """Id, description and each column of the metadata as a column of its own."""
    arrays = {"id": table["id"], "description": table["description"]}
    if "metadata" in table.column_names:
        metadata = table["metadata"].combine_chunks()
        arrays |= {field.name: metadata.field(field.name) for field in metadata.type}
    return pa.table(arrays)


def _mask(table: pa.Table, expression: pc.Expression) -> np.ndarray:
    plan = acero.Declaration.from_sequence(
        [
            acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
            acero.Declaration("project", acero.ProjectNodeOptions([expression], ["mask"])),
        ]
    )
    return pc.fill_null(plan.to_table(use_threads=False)["mask"], False).to_numpy()


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in schema)


class _Reader:
    """Turns a filter's syntax tree into a pyarrow expression."""

    def __init__(self, text: str, schema: pa.Schema) -> None:
        self._text, self._schema = text, schema

    def read(self) -> pc.Expression:
        if len(self._text) > MOST_CHARACTERS:
            raise FilterError(f"the filter has {len(self._text):,} characters, expected at most {MOST_CHARACTERS:,}")
        try:
            with _PARSING:
                tree = ast.parse(self._text.strip(), mode="eval")
            return self._condition(tree.body)
        except SyntaxError as error:
            place = f"character {error.offset}" if error.offset else "its end"
            raise FilterError(f"filter {self._text!r}: {error.msg} at {place}; {_EXPECTED}") from error
        except (RecursionError, MemoryError, ValueError) as error:
            if isinstance(error, FilterError):
                raise
            raise FilterError(f"the filter can't be read: it is nested too deeply, or no text ({error})") from error

    def _condition(self, node: ast.expr) -> pc.Expression:
        match node:
            case ast.BoolOp(op, values):
                combine = operator.and_ if isinstance(op, ast.And) else operator.or_
                out = self._condition(values[0])
                for value in values[1:]:
                    out = combine(out, self._condition(value))
                return out
            case ast.UnaryOp(ast.Not(), operand):
                return ~self._condition(operand)
            case ast.Compare(left, operators, others):
                sides = [left, *others]
                out = None
                for place, each in enumerate(operators):
                    one = self._comparison(sides[place], each, sides[place + 1])
                    out = one if out is None else out & one
                assert out is not None
                return out
            case ast.Name():
                if not pa.types.is_boolean(self._schema.field(self._known(node)).type):
                    raise self._error(node, f"column {node.id!r} is no condition: it is not bool")
                return pc.field(node.id)
            case ast.Constant(bool(value)):
                return pc.scalar(value)
        raise self._error(node, "this is no condition")

    def _comparison(self, left: ast.expr, kind: ast.cmpop, right: ast.expr) -> pc.Expression:
        match kind:
            case ast.In() | ast.NotIn():
                if not isinstance(right, ast.List | ast.Tuple):
                    raise self._error(right, "`in` needs a list of values, such as [1, 2]")
                found = pc.scalar(False)
                for each in right.elts:
                    self._value(each)
                    found = found | self._compared(left, operator.eq, each)
                return ~found if isinstance(kind, ast.NotIn) else found
            case ast.Is() | ast.IsNot():
                if not (isinstance(right, ast.Constant) and right.value is None and isinstance(left, ast.Name)):
                    raise self._error(right, "`is` compares a column with None")
                missing = pc.field(self._known(left)).is_null()
                return ~missing if isinstance(kind, ast.IsNot) else missing
        if any(isinstance(side, ast.Constant) and side.value is None for side in (left, right)):
            raise self._error(left, "nothing equals None; write `is None` or `is not None`")
        return self._compared(left, _COMPARISONS[type(kind)], right)

    def _compared(self, left: ast.expr, compare: Callable[[Any, Any], Any], right: ast.expr) -> pc.Expression:
        (mine, my_type), (other, other_type) = self._operand(left), self._operand(right)
        if pa.types.is_integer(my_type) and pa.types.is_floating(other_type):
            mine = mine.cast(pa.float64(), safe=False)
        if pa.types.is_integer(other_type) and pa.types.is_floating(my_type):
            other = other.cast(pa.float64(), safe=False)
        return compare(mine, other)

    def _operand(self, node: ast.expr) -> tuple[pc.Expression, pa.DataType]:
        if isinstance(node, ast.Name):
            return pc.field(self._known(node)), self._schema.field(node.id).type
        value = pa.scalar(self._value(node))
        return pc.scalar(value), value.type

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value) if isinstance(value, bool | int | float | str):
                return self._within(node, value)
            case ast.UnaryOp(ast.USub(), ast.Constant(value)) if isinstance(value, int | float):
                return self._within(node, -value)
        raise self._error(node, "this is neither a column nor a number, a text, True or False")

    def _within(self, node: ast.expr, value: Any) -> Any:
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise self._error(node, f"{value} is beyond 64 bits")
        return value

    def _known(self, node: ast.Name) -> str:
        if node.id not in self._schema.names:
            raise self._error(
                node, f"no column {node.id!r}; the columns are {', '.join(self._schema.names)}", ends=True
            )
        return node.id

    def _error(self, node: ast.expr, problem: str, *, ends: bool = False) -> FilterError:
        part = ast.get_source_segment(self._text.strip(), node) or ""
        found = "" if ends else f", found {part[:80]!r}; {_EXPECTED}"
        return FilterError(f"filter {self._text!r}, character {node.col_offset + 1}: {problem}{found}")
