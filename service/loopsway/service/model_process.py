"""The process in which tasks and their models run, beside the server: `python -m loopsway.service.model_process`.

B examples, S steps, W width. One for all indices of a server, so that one budget of memory holds for all their models.
What a task's code does here, to the point of ending the process, costs the server no more than the queries under way.
Task code is the user's, and what it reads may come from the network: a ValueError out of it is the query's fault, a
TaskError or anything else is the task's own.

It knows no gRPC. It ends when the server closes the socket, and ignores the signals that end the server, which lets
running requests finish first.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from loopsway.indexer import ExampleSketcher, Task, TaskError, load_sketcher, open_index
from loopsway.indexer.memory import is_out_of_memory
from loopsway.indexer.sketches.weights import WeightMemory

from .frames import LENGTH, Message, decoded, encoded
from .logs import LogFormat, configure_logs

SHARE = 0.5  # of the free memory that weights may take, unless told otherwise; batches and codes need the rest

_log = logging.getLogger(__name__)


class CancelledError(Exception):
    """Nobody waits for this any more."""


class QueryError(Exception):
    """One query is refused.

    Attributes:
        kind: "invalid", "precondition" or "unavailable".
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class LoadedTask:
    """One index's task and its sketcher.

    Args:
        name: of the index, for errors.
        task: whose code reads and runs the examples.
        sketcher: of the same task.
        memory: that the sketcher's models are in.
    """

    def __init__(self, name: str, task: Task, sketcher: ExampleSketcher, memory: WeightMemory) -> None:
        self._name, self._task, self._sketcher, self._memory = name, task, sketcher, memory
        self._examples = task.examples()

    def close(self) -> None:
        self._sketcher.close()

    def example(self, item: Message) -> Any:
        """The example that a query is about.

        Raises:
            QueryError: the task has none such.
        """
        if "json" in item:
            return self._example_from_json(item["json"])
        row, example_id = item["row"], item.get("id")
        if example_id is not None and not self._is_at(row, example_id):
            row = self._rows.get(example_id)  # an index that was compacted, say, numbers its rows anew
        if row is None or row >= len(self._examples):
            raise QueryError(
                "precondition",
                f"the task's examples changed since index {self._name} was built: {example_id!r} is no longer among "
                "them; rebuild the index or serve the task that it was built from",
            )
        return self._examples[row]

    def sketch(self, examples: Sequence[Any], go_on: Callable[[], object]) -> list[_Sketch | QueryError]:
        """Together; where memory does not suffice, one by one with nothing else loaded."""
        try:
            return self._sketch(examples, go_on)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("out of memory with a batch of %d examples of index %s", len(examples), self._name)
        return [self._sketch_alone(example, go_on) for example in examples]

    def _sketch(self, examples: Sequence[Any], go_on: Callable[[], object]) -> list[_Sketch | QueryError]:
        sketches = self._sketcher.sketch(examples, go_on=go_on)
        values, losses = sketches.values.numpy(), sketches.losses.numpy()  # [B, S, W], [K, B]
        return [
            (values[i], {"losses": losses[:, i].tolist(), "silent": sketches.steps_without_gradient})
            for i in range(len(examples))
        ]

    def _sketch_alone(self, example: Any, go_on: Callable[[], object]) -> _Sketch | QueryError:
        self._memory.clear()
        gc.collect()  # what the failed batch left may be in cycles
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        try:
            return self._sketch([example], go_on)[0]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("out of memory with one example of index %s, alone", self._name)
        return QueryError("unavailable", "the model has too little memory for this query now; ask again later")

    def _example_from_json(self, obj: Any) -> Any:
        name = type(self._task).__name__
        try:
            return self._task.example_from_json(obj)
        except ValueError as error:
            raise QueryError("invalid", f"not an example of {name}: {error}") from error
        except NotImplementedError as error:
            raise QueryError(
                "precondition",
                f"{name} takes no JSON queries (it defines no example_from_json): ask by example id or sketch",
            ) from error
        except (LookupError, TypeError, AttributeError) as error:
            # Task authors index into the object without checking; the caller still deserves the blame and the hint.
            # The error's text may be the caller's own words, which are not for the log.
            *_, place = traceback.extract_tb(error.__traceback__)
            _log.warning(
                "%s.example_from_json failed without a ValueError: %s at %s:%d",
                *(name, type(error).__name__, place.filename, place.lineno),
            )
            raise QueryError(
                "invalid", f"not an example of {name}: its example_from_json could not read this JSON"
            ) from error

    def _is_at(self, row: int, example_id: str) -> bool:
        return row < len(self._examples) and self._task.example_id(row) == example_id

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {self._task.example_id(row): row for row in range(len(self._examples))}


_Sketch = tuple[np.ndarray, Message]  # [S, W], and what was found out on the way


class ModelProcess:
    """Does what the server asks for, one thing after another.

    Args:
        connection: to the server.
        device: a torch device name.
        model_bytes: of all weights in memory. None: half of what is free.
    """

    def __init__(self, connection: socket.socket, *, device: str, model_bytes: int | None) -> None:
        self._connection, self._device = connection, device
        self._memory = WeightMemory(model_bytes or free_bytes(torch.device(device)))
        self._tasks: dict[str, LoadedTask] = {}
        self._waiting: SimpleQueue[Message] = SimpleQueue()
        self._cancelled: set[int] = set()

    def run(self) -> None:
        """Until the server has closed the socket."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            message = self._waiting.get()
            try:
                reply, arrays = self._do(message)
            except CancelledError:
                continue
            except Exception as error:
                reply, arrays = {"error": _kind(error), "text": str(error)}, []
                if reply["error"] == "internal":
                    _log.exception("%s failed", message["kind"])
            finally:
                for number in list(self._cancelled):  # ids ascend: what is older is done
                    if number <= message["id"]:
                        self._cancelled.discard(number)
            held = {"held_checkpoints": self._memory.num_held, "held_bytes": self._memory.held_bytes}
            try:
                self._connection.sendall(encoded(reply | held | {"id": message["id"]}, arrays))
            except ConnectionError:
                return  # the server ended meanwhile

    def _read(self) -> None:
        """Takes messages in as they come: a cancellation counts for what is under way."""
        try:
            with self._connection.makefile("rb") as stream:
                while head := stream.read(LENGTH.size):
                    message, _ = decoded(stream.read(LENGTH.unpack(head)[0]))
                    if message["kind"] == "cancel":
                        self._cancelled.add(message["of"])
                    else:
                        self._waiting.put(message)
        finally:
            os._exit(0)  # the server has ended or closed the socket; a running batch is of use to nobody

    def _do(self, message: Message) -> tuple[Message, list[np.ndarray]]:
        match message["kind"]:
            case "load":
                self._load(message)
            case "forget":
                if task := self._tasks.pop(message["key"], None):
                    task.close()
            case "sketch":
                return self._sketch(message)
        return {}, []

    def _load(self, message: Message) -> None:
        index = open_index(message["path"], generation=message["generation"])
        task, sketcher = load_sketcher(
            index,
            message["task"],
            message["arguments"],
            device=self._device,
            batch_size=message["batch_size"],
            memory=self._memory,
        )
        self._tasks[message["key"]] = LoadedTask(message["name"], task, sketcher, self._memory)

    def _sketch(self, message: Message) -> tuple[Message, list[np.ndarray]]:
        def go_on() -> None:
            if message["id"] in self._cancelled:
                raise CancelledError

        go_on()
        task, examples, results = self._tasks[message["key"]], dict[int, Any](), dict[int, Message]()
        for place, item in enumerate(message["items"]):
            try:
                examples[place] = task.example(item)
            except QueryError as error:
                results[place] = {"refused": error.kind, "text": str(error)}
        values = []
        sketched = task.sketch(list(examples.values()), go_on) if examples else []
        for place, found in zip(examples, sketched, strict=True):
            if isinstance(found, QueryError):
                results[place] = {"refused": found.kind, "text": str(found)}
            else:
                values.append(found[0])
                results[place] = found[1]
        return {"results": [results[place] for place in range(len(message["items"]))]}, values


def free_bytes(device: torch.device) -> int | None:
    """The share of a device's free memory that weights may take; None where the system does not tell."""
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or not (facts := Path("/proc/meminfo")).exists():
        return None
    lines = dict(line.split(":") for line in facts.read_text().splitlines())
    return int(SHARE * int(lines["MemAvailable"].split()[0]) * 1024)


def _kind(error: Exception) -> str:
    if isinstance(error, TaskError):
        return "task"
    return "invalid" if isinstance(error, ValueError | OSError) else "internal"


def main(
    descriptor: int,
    device: str,
    model_bytes: int | None,
    model_threads: int | None,
    log_format: LogFormat,
    log_level: str,
) -> None:
    # Threads that wait for each other at every operation lose more by one that has no processor than it does for them.
    torch.set_num_threads(model_threads or max(1, torch.get_num_threads() - 1))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    configure_logs(log_format, log_level)
    ModelProcess(socket.socket(fileno=descriptor), device=device, model_bytes=model_bytes).run()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
