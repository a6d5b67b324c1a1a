"""JSON of a query to a Python value, or a refusal. It knows neither requests nor tasks.

It may come from anybody and take long to read, and holds Python's lock meanwhile: it is read in the model's process.
"""

from __future__ import annotations

import gc
import json
import re
from typing import Any, NoReturn


def value_of(text: str, max_depth: int) -> Any:
    """What the JSON says.

    Raises:
        ValueError: it is none, or has more than `max_depth` arrays and objects within one another.
    """
    if (depth := depth_of(text)) > max_depth:
        raise ValueError(f"the JSON is {depth} arrays and objects deep, expected at most {max_depth}")
    # What JSON says has no cycles, and the collector would look through all that the process holds again and again.
    gc.disable()
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    finally:
        gc.enable()


def depth_of(text: str) -> int:
    """How many arrays and objects are open at once, at the most; read without opening any."""
    depth = deepest = 0
    for part in _BRACKETS.findall(text):
        depth += part in ("[", "{")
        depth -= part in ("]", "}")
        deepest = max(deepest, depth)
    return deepest


# Strings are found whole, an unfinished one up to the end, so that no bracket in them counts.
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
