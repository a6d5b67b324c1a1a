"""One query's sketch as it grows out of its gradients: in this process, or in the model's, which has second moments.

S steps, W width. A piece goes to the model's process as a message and its arrays.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loopsway.indexer import GradientError, GradientSketch, TaskError
from loopsway.wire import DenseGradient, FactoredGradient, GradientPiece, RowGradient

from .frames import Message

_FORMS: dict[str, type[GradientPiece]] = {
    form.__name__: form for form in (DenseGradient, FactoredGradient, RowGradient)
}


class GrowingSketch(Protocol):
    """A sketch that pieces are added to, one at a time, and that is closed in the end."""

    async def add(self, piece: GradientPiece) -> None:
        """Adds a piece.

        Raises:
            GradientError: it is none of the index's parameters'.
            UnavailableError: the model's process died.
        """
        ...

    async def finish(self) -> NDArray[np.float32]:
        """The sketch, [S, W]; raises as `add`."""
        ...

    def close(self) -> None:
        """Forgets it."""
        ...


class LocalSketch:
    """In a thread of this process."""

    def __init__(self, sketch: GradientSketch) -> None:
        self._sketch = sketch

    async def add(self, piece: GradientPiece) -> None:
        await asyncio.to_thread(self._sketch.add, piece)

    async def finish(self) -> NDArray[np.float32]:
        return await asyncio.to_thread(self._sketch.finish)

    def close(self) -> None:
        """There is nothing beside the object."""


class Process(Protocol):
    """The model's, as long as it lives."""

    def tell(self, message: Message) -> int: ...

    async def request(
        self, message: Message, arrays: Sequence[NDArray[Any]] = ()
    ) -> tuple[Message, list[NDArray[Any]]]: ...


class ModelSketch:
    """In the model's process, and lost when that dies.

    Args:
        process: it.
        number: of the sketch there.
    """

    def __init__(self, process: Process, number: int) -> None:
        self._process, self._number = process, number

    async def add(self, piece: GradientPiece) -> None:
        message, arrays = message_of(piece)
        await self._ask("add_gradient", {"piece": message}, arrays)

    async def finish(self) -> NDArray[np.float32]:
        (values,) = await self._ask("finish_gradients")
        return values

    def close(self) -> None:
        self._process.tell({"kind": "drop_gradients", "number": self._number})

    async def _ask(
        self, kind: str, message: Message | None = None, arrays: Sequence[NDArray[Any]] = ()
    ) -> list[NDArray[Any]]:
        try:
            _, found = await self._process.request({"kind": kind, "number": self._number, **(message or {})}, arrays)
        except TaskError:
            raise
        except ValueError as error:
            raise GradientError(str(error)) from error
        return found


def message_of(piece: GradientPiece) -> tuple[Message, list[NDArray[Any]]]:
    """The piece as JSON, and its arrays."""
    arrays = {name: value for name, value in vars(piece).items() if isinstance(value, np.ndarray)}
    plain = {name: value for name, value in vars(piece).items() if name not in arrays}
    return {"form": type(piece).__name__, "plain": plain, "arrays": list(arrays)}, list(arrays.values())


def piece_of(message: Message, arrays: Sequence[NDArray[Any]]) -> GradientPiece:
    """The same piece again."""
    values: dict[str, Any] = message["plain"] | dict(zip(message["arrays"], arrays, strict=True))
    return _FORMS[message["form"]](**values)
