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
    return _made(loop)


def compiled_sums(loop: _Loop) -> _Loop:
    """As `compiled`, and it adds in any order, in vectors: the last bits of its sums may be another machine's own."""
    return _made(loop, fastmath={"reassoc", "contract", "nsz"})


def _made(loop: _Loop, **options: Any) -> _Loop:
    made: Any
    try:
        made = numba.njit(nogil=True, cache=True, **options)(loop)
    except RuntimeError:  # no folder can be written to: every process compiles anew
        made = numba.njit(nogil=True, **options)(loop)
    return made
