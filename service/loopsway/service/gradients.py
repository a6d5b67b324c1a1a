"""One query's gradients off a stream: checked against what was declared, sketched as they come, and forgotten."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopsway.indexer import GradientError
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.tensors import from_tensor
from loopsway.wire import DenseGradient, FactoredGradient, GradientPiece, RowGradient

from .engine import Engine
from .errors import InvalidFieldError
from .limits import check_limits
from .record import part
from .settings import Settings


async def sketched(
    requests: AsyncIterator[pb.SketchGradientsRequest], engine_of: Callable[[str], Engine], settings: Settings
) -> tuple[Engine, NDArray[np.float32]]:
    """The engine that was asked for, and the query's sketch.

    Args:
        requests: the stream.
        engine_of: the engine of an index by its name.
        settings: the limits.

    Raises:
        RequestError: the stream is none of an allowed query's gradients.
    """
    first = await anext(requests, None)
    if first is None or first.WhichOneof("part") != "header":
        raise InvalidFieldError("the stream does not begin with its header", field="header")
    check_limits(first, settings)
    _check_steps(first.header, settings)
    engine = engine_of(first.header.index)
    with closing(await engine.begin_gradients(first.header.step_count)) as sketch:
        _check_size(first.header, engine)
        received = _Received(first.header.total_bytes)
        async for request in requests:
            check_limits(request, settings)
            match request.WhichOneof("part"):
                case "piece":
                    with part("sketch"), _refusing(f"piece.{request.piece.WhichOneof('form')}"):
                        await sketch.add(await asyncio.to_thread(received.piece, request.piece))
                case "end":
                    received.check(request.end)
                    with part("sketch"), _refusing("piece"):
                        return engine, await sketch.finish()
                case _:
                    raise InvalidFieldError("expected a piece or the end after the header", field="part")
    raise InvalidFieldError(
        f"the stream was cut off after {received.num_bytes} of {first.header.total_bytes} bytes, without its end",
        field="end",
    )


@contextmanager
def _refusing(field: str) -> Iterator[None]:
    try:
        yield
    except GradientError as error:
        raise InvalidFieldError(str(error), field=field) from error


class _Received:
    """What came so far."""

    def __init__(self, total_bytes: int) -> None:
        self.num_bytes, self._total_bytes, self._digest = 0, total_bytes, hashlib.sha256()

    def piece(self, message: pb.GradientPiece) -> GradientPiece:
        """The next one, counted."""
        form = message.WhichOneof("form")
        if form is None:
            raise InvalidFieldError("the piece is empty, expected dense, factors or rows", field="piece")
        field = f"piece.{form}"
        tensors: list[pb.Tensor] = [tensor for _, tensor in getattr(message, form).ListFields()
                                    if isinstance(tensor, pb.Tensor)]  # fmt: skip
        self.num_bytes += sum(len(tensor.data) for tensor in tensors)
        if self.num_bytes > self._total_bytes:
            raise InvalidFieldError(
                f"the pieces so far have {self.num_bytes} bytes, the header declared {self._total_bytes}", field=field
            )
        for tensor in tensors:  # in the order of their fields' numbers, as ListFields promises
            self._digest.update(tensor.data)
        return _piece(message, form)

    def check(self, end: pb.GradientEnd) -> None:
        """That what came is what was sent."""
        if self.num_bytes != self._total_bytes:
            raise InvalidFieldError(
                f"{self.num_bytes} bytes came, the header declared {self._total_bytes}", field="header.total_bytes"
            )
        if end.sha256 != self._digest.digest():
            raise InvalidFieldError(
                f"the SHA-256 of what came is {self._digest.hexdigest()}, the end says {end.sha256.hex() or 'nothing'}",
                field="end.sha256",
            )


def _check_steps(header: pb.GradientHeader, settings: Settings) -> None:
    if not 1 <= header.step_count <= settings.max_steps:
        raise InvalidFieldError(
            f"step_count is {header.step_count}, expected 1 to {settings.max_steps}", field="header.step_count"
        )


def _check_size(header: pb.GradientHeader, engine: Engine) -> None:
    most = engine.max_gradient_bytes
    if not 1 <= header.total_bytes <= most:
        raise InvalidFieldError(
            f"the gradients are {header.total_bytes} bytes, index {engine.name} takes 1 to {most} of one query: send "
            "factors instead of entries, or half precision; or sketch them where they are",
            field="header.total_bytes",
        )


def _piece(message: pb.GradientPiece, form: str) -> GradientPiece:
    where: dict[str, Any] = {
        "checkpoint": message.checkpoint,
        "parameter": message.parameter,
        "step": message.step,
    }
    match form:
        case "dense":
            values = _array(message.dense.values, "piece.dense.values")
            return DenseGradient(**where, values=values, start=message.dense.start)
        case "factors":
            left = _array(message.factors.output_gradients, "piece.factors.output_gradients")
            return FactoredGradient(
                **where, output_gradients=left, inputs=_array(message.factors.inputs, "piece.factors.inputs")
            )
        case _:
            rows = _array(message.rows.rows, "piece.rows.rows")
            return RowGradient(**where, rows=rows, values=_array(message.rows.values, "piece.rows.values"))


def _array(tensor: pb.Tensor, field: str) -> NDArray[Any]:
    try:
        return from_tensor(tensor)
    except ValueError as error:
        raise InvalidFieldError(str(error), field=field) from error
