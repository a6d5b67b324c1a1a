"""Loops that Numba compiles when they first run, for the machine that they run on.

Compiled code is kept in Numba's cache, next to the source or in the user's cache folder. Loops run without Python's
lock, so that threads share them out. An inner loop from 0 over an array of its own becomes vector instructions; one
over places that might count from an array's end does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

_Loop = TypeVar("_Loop", bound=Callable[..., Any])


def compiled(loop: _Loop) -> _Loop:
    """Compiles a function of arrays and numbers at its first call with arguments of these types."""
    made: Any
    try:
        made = numba.njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # no folder can be written to: every process compiles anew
        made = numba.njit(nogil=True)(loop)
    return made
