"""Filters match what Python's own comparison of the rows matches, and refuse all that is no comparison."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopsway.indexer.search.filters import FilterError, matching_rows

ROWS: list[dict[str, Any]] = [
    {"length": 3, "score": 0.5, "source": "web", "clean": True},
    {"length": -7, "score": None, "source": "gsm8k", "clean": False},
    {"length": None, "score": -1.5, "source": None, "clean": None},
    {"length": 2**62, "score": 3.0, "source": 'a "quoted" one', "clean": True},
    {"length": 0, "score": 0.0, "source": "", "clean": False},
]
IDS = [f"train/{row}" for row in range(len(ROWS))]


def table(*, metadata: bool = True) -> pa.Table:
    columns: dict[str, Any] = {"id": IDS, "description": [f"row {row}" for row in range(len(ROWS))]}
    return pa.table(columns | ({"metadata": ROWS} if metadata else {}))


def matched(text: str) -> list[int]:
    found = matching_rows(table(), text)
    assert found.dtype == bool
    return np.flatnonzero(found).tolist()


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("length == 3", [0]),
        ("length != 3", [1, 3, 4]),
        ("-8 < length <= 3", [0, 1, 4]),
        ("3 > length", [1, 4]),
        ("length < 2.5", [1, 4]),
        ("score >= -1.5 and score < 1", [0, 2, 4]),
        ('source == "gsm8k" or source == ""', [1, 4]),
        ("source in ['web', \"gsm8k\"]", [0, 1]),
        ("source not in ('web',)", [1, 3, 4]),
        ("length in []", []),
        ("not length == 3", [1, 3, 4]),
        ("not (length > 0 or score > 0)", [4]),
        ("source is None", [2]),
        ("score is not None and not clean", [4]),
        ("clean", [0, 3]),
        ("clean == False", [1, 4]),
        ("not clean", [1, 4]),
        ('id == "train/3"', [3]),
        ('description in ["row 1", "row 2"]', [1, 2]),
        ('"web" <= source', [0]),
        ("length == score", [4]),
        ("True", [0, 1, 2, 3, 4]),
        (" length == 3 ", [0]),
        ("length == 4611686018427387904", [3]),
        ("""source == 'a "quoted" one'""", [3]),
    ],
)
def test_a_filter_matches(text: str, rows: list[int]) -> None:
    assert matched(text) == rows


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "lenght < 3",
            r"character 1: no column 'lenght'; the columns are id, description, length, score, source, clean",
        ),
        ("length <", "invalid syntax at its end"),
        ("", "invalid syntax"),
        ("length = 3", "character"),
        ("length", "character 1: column 'length' is no condition: it is not bool"),
        ("length + 1 == 3", r"character 1: this is neither a column nor .*found 'length \+ 1'"),
        ("length == None", "write `is None`"),
        ("length is 3", "`is` compares a column with None"),
        ("3 is None", "`is` compares a column with None"),
        ("length in 3", "`in` needs a list of values"),
        ("'w' in source", "`in` needs a list of values"),
        ("length in [source]", "neither a column nor a number"),
        ("length == 9223372036854775808", "is beyond 64 bits"),
        ("length == -9223372036854775809", "is beyond 64 bits"),
        ("__import__('os').system('true')", "this is no condition"),
        ("length.__class__ == 3", "neither a column nor"),
        ("(lambda: length)() == 3", "neither a column nor"),
        ("length[0] == 3", "neither a column nor"),
        ("f'{length}' == 'a'", "neither a column nor"),
        ("[x for x in (1,)] == 3", "neither a column nor"),
        ("(x := 3) == 3", "neither a column nor"),
        ("length == b'a'", "neither a column nor"),
        ("clean if clean else clean", "this is no condition"),
        ("~clean", "this is no condition"),
        ("3", "this is no condition"),
        ('length == "three"', r"does not fit the columns .*length \(int64\)"),
        ("source < 3", r"does not fit the columns .*source \(string\)"),
        ("clean and source", "column 'source' is no condition"),
        ("length == 3\0", "null bytes at its end"),
        ("(" * 5000 + "clean" + ")" * 4999, "character|can't be read"),
        ("not " * 2400 + "clean", "can't be read|nested"),
        ("clean or " * 2000 + "clean", "the filter has 18,005 characters, expected at most 10,000"),
    ],
)
def test_what_is_no_filter_is_refused(text: str, problem: str) -> None:
    with pytest.raises(FilterError, match=problem):
        matching_rows(table(), text)


def test_examples_without_metadata_have_their_ids() -> None:
    assert matching_rows(table(metadata=False), 'id == "train/1"').tolist() == [False, True, False, False, False]
    with pytest.raises(FilterError, match="no column 'length'; the columns are id, description"):
        matching_rows(table(metadata=False), "length == 3")


COLUMNS = {
    "length": st.sampled_from([-7, 0, 3, 5, 2**62]),
    "score": st.sampled_from([-1.5, 0.0, 0.5, 2.5]),
    "source": st.sampled_from(["web", "gsm8k", "", "other"]),
}
COMPARISONS = st.sampled_from(["==", "!=", "<", "<=", ">", ">="])
# What a condition is: its text, and what it says of a row: True, False or None.
Condition = tuple[str, Any]


@st.composite
def comparisons(draw: st.DrawFn) -> Condition:
    column = draw(st.sampled_from(sorted(COLUMNS)))
    kind = draw(st.sampled_from(["compare", "in", "is"]))
    if kind == "is":
        return f"{column} is None", lambda row: row[column] is None
    if kind == "in":
        values = draw(st.lists(COLUMNS[column], min_size=1, max_size=3))
        return f"{column} in {values!r}", lambda row: None if row[column] is None else row[column] in values
    sign, value = draw(COMPARISONS), draw(COLUMNS[column])
    code = compile(f"a {sign} b", "", "eval")
    return (
        f"{column} {sign} {value!r}",
        lambda row: None if row[column] is None else eval(code, {"a": row[column], "b": value}),
    )


def conjoined(parts: tuple[Condition, Condition]) -> Condition:
    (left, first), (right, second) = parts

    def both(row: Any) -> bool | None:
        values = first(row), second(row)
        return False if False in values else None if None in values else True

    return f"({left}) and ({right})", both


def negated(part: Condition) -> Condition:
    text, holds = part
    return f"not ({text})", lambda row: None if (value := holds(row)) is None else not value


CONDITIONS = st.recursive(
    comparisons(),
    lambda inner: st.one_of(st.tuples(inner, inner).map(conjoined), inner.map(negated)),
    max_leaves=6,
)


@given(CONDITIONS)
@settings(max_examples=150, deadline=None)
def test_any_filter_matches_what_python_says_of_each_row(condition: Condition) -> None:
    text, holds = condition
    assert matched(text) == [row for row, values in enumerate(ROWS) if holds(values) is True]


def test_filters_may_be_read_in_many_threads_at_once() -> None:
    nested = "clean and (" * 60 + "clean" + ")" * 60

    def let_others_run(*_: Any) -> None:  # while a tree is made, as any finalizer may
        time.sleep(0)

    thresholds = gc.get_threshold()
    gc.set_threshold(50)
    gc.callbacks.append(let_others_run)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(matched, [nested] * 400)) == [[0, 3]] * 400
    finally:
        gc.callbacks.remove(let_others_run)
        gc.set_threshold(*thresholds)
