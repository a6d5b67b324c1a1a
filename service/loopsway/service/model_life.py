"""One model process, from its start to its end: the socket to it, and what waits for its replies."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np

from loopsway.indexer import TaskError

from .errors import UnavailableError
from .frames import LENGTH, Message, decoded, encoded
from .settings import Settings

END_S = 5.0  # that a process gets to end by itself
OF_PROCESS = {"model_bytes", "model_threads", "max_json_depth", "log_format", "log_level"}  # of the settings

Reply = tuple[Message, list[np.ndarray]]


class Life:
    """A process that was started.

    Attributes:
        process: it.
        reading: done when it has closed its end of the socket, which it does only by ending.
        held: as of `ModelWorker`.
    """

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.process, self._reader, self._writer = process, reader, writer
        self._pending: dict[int, asyncio.Future[Reply]] = {}
        self._ids = count()
        self.held = (0, 0)
        self.reading = asyncio.create_task(self._read())

    @classmethod
    async def begin(cls, settings: Settings) -> Life:
        ours, theirs = socket.socketpair()
        with theirs:
            facts = {"descriptor": theirs.fileno(), **settings.model_dump(include=OF_PROCESS)}
            # A fresh interpreter, not a fork: what runs threads, as torch and gRPC do, hangs in a forked child.
            process = subprocess.Popen(
                [sys.executable, "-m", "loopsway.service.model_process", json.dumps(facts)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a task prints is for the log
            )
        return cls(process, *await asyncio.open_connection(sock=ours))

    def tell(self, message: Message, arrays: Sequence[np.ndarray] = ()) -> int:
        """Sends a message, unless the process died; gives its id."""
        number = next(self._ids)
        if not self.reading.done():
            self._writer.write(encoded(message | {"id": number}, arrays))
        return number

    async def request(self, message: Message, arrays: Sequence[np.ndarray] = ()) -> Reply:
        if self.reading.done():
            raise died(self.process)
        number = self.tell(message, arrays)
        future = self._pending[number] = asyncio.get_running_loop().create_future()
        try:
            reply, found = await future
        except asyncio.CancelledError:
            self.tell({"kind": "cancel", "of": number})
            raise
        finally:
            del self._pending[number]
        match reply.get("error"):
            case None:
                return reply, found
            case "invalid":
                raise ValueError(reply["text"])
            case "task":
                raise TaskError(reply["text"])
            case _:
                raise RuntimeError(f"in the model's process: {reply['text']}")

    async def end(self) -> None:
        """Closes the socket, which ends the process, and waits for it."""
        self._writer.close()
        try:
            await asyncio.to_thread(self.process.wait, END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)
        await asyncio.wait([self.reading])

    async def _read(self) -> None:
        try:
            while True:
                (length,) = LENGTH.unpack(await self._reader.readexactly(LENGTH.size))
                reply, arrays = decoded(await self._reader.readexactly(length))
                self.held = (reply["held_checkpoints"], reply["held_bytes"])
                future = self._pending.get(reply["id"])
                if future is not None and not future.done():
                    future.set_result((reply, arrays))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            for future in self._pending.values():
                if not future.done():
                    future.set_exception(died(self.process))


def died(process: subprocess.Popen[Any]) -> UnavailableError:
    return UnavailableError(f"the model's process {process.pid} died; it is started again", retry_after_s=1.0)
