"""The process in which tasks and their models run, beside the server: `python -m loopsway.service.model_process`.

One for all indices of a server, so that one budget of memory holds for all models on a device. What a task's code does
here, to the point of ending the process, costs the server no more than the queries under way; so does a query's JSON,
which can take long to read. After a fault of a device, which only a new process can use again, it ends by itself.

It knows no gRPC. It ends when the server closes the socket, and ignores the signals that end the server, which lets
running requests finish first.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch

from loopsway.indexer import GradientSketch, TaskError, load_sketcher, open_index
from loopsway.indexer.memory import is_device_fault
from loopsway.indexer.sketches.weights import WeightMemory

from .frames import LENGTH, Message, decoded, encoded
from .freed_memory import give_back_freed_memory
from .gradient_sketches import piece_of
from .loaded_task import LoadedTask, QueryError
from .logs import LogFormat, configure_logs

SHARE = 0.5  # of the free memory that weights may take, unless told otherwise; batches and codes need the rest

_log = logging.getLogger(__name__)


class CancelledError(Exception):
    """Nobody waits for this any more."""


class ModelProcess:
    """Does what the server asks for, one thing after another.

    Args:
        connection: to the server.
        model_bytes: of all weights in one device's memory. None: half of what is free there.
        max_json_depth: as of `Settings`.
    """

    def __init__(self, connection: socket.socket, *, model_bytes: int | None, max_json_depth: int) -> None:
        self._connection, self._model_bytes, self._max_json_depth = connection, model_bytes, max_json_depth
        self._memories: dict[torch.device, WeightMemory] = {}
        self._tasks: dict[str, LoadedTask] = {}
        self._gradients: dict[int, GradientSketch] = {}  # sketches that still grow, by their numbers
        self._waiting: SimpleQueue[tuple[Message, list[np.ndarray]]] = SimpleQueue()
        self._cancelled: set[int] = set()

    def run(self) -> None:
        """Until the server has closed the socket."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            message, given = self._waiting.get()
            try:
                reply, arrays = self._do(message, given)
            except CancelledError:
                continue
            except Exception as error:
                if is_device_fault(error):
                    _log.exception(
                        "%s failed for good: the device is lost to this process, which ends", message["kind"]
                    )
                    os._exit(1)  # a new process has the device anew
                reply, arrays = {"error": _kind(error), "text": str(error)}, []
                if reply["error"] == "internal":
                    _log.exception("%s failed", message["kind"])
            finally:
                for number in list(self._cancelled):  # ids ascend: what is older is done
                    if number <= message["id"]:
                        self._cancelled.discard(number)
            memories = self._memories.values()
            held = {
                "held_checkpoints": sum(memory.num_held for memory in memories),
                "held_bytes": sum(memory.held_bytes for memory in memories),
            }
            try:
                self._connection.sendall(encoded(reply | held | {"id": message["id"]}, arrays))
            except ConnectionError:
                return  # the server ended meanwhile

    def _read(self) -> None:
        """Takes messages in as they come: a cancellation counts for what is under way."""
        try:
            with self._connection.makefile("rb") as stream:
                while head := stream.read(LENGTH.size):
                    message, arrays = decoded(stream.read(LENGTH.unpack(head)[0]))
                    if message["kind"] == "cancel":
                        self._cancelled.add(message["of"])
                    else:
                        self._waiting.put((message, arrays))
        finally:
            os._exit(0)  # the server has ended or closed the socket; a running batch is of use to nobody

    def _do(self, message: Message, arrays: Sequence[np.ndarray]) -> tuple[Message, list[np.ndarray]]:
        match message["kind"]:
            case "load":
                self._load(message)
            case "forget":
                if task := self._tasks.pop(message["key"], None):
                    task.close()
            case "sketch":
                return self._sketch(message)
            case "begin_gradients":
                sketch = self._tasks[message["key"]].begin_gradients(message["num_steps"])
                self._gradients[message["number"]] = sketch
            case "add_gradient":
                self._gradients[message["number"]].add(piece_of(message["piece"], arrays))
            case "finish_gradients":
                return {}, [self._gradients[message["number"]].finish()]
            case "drop_gradients":
                self._gradients.pop(message["number"], None)
        return {}, []

    def _load(self, message: Message) -> None:
        if message["key"] in self._tasks:
            return  # whoever had it loaded did not wait for that
        index = open_index(message["path"], generation=message["generation"])
        memory = self._memory_of(message["device"])
        task, sketcher = load_sketcher(
            index,
            message["task"],
            message["arguments"],
            device=message["device"],
            batch_size=message["batch_size"],
            memory=memory,
        )
        self._tasks[message["key"]] = LoadedTask(
            message["name"], task, sketcher, memory, max_json_depth=self._max_json_depth
        )
        _log.info("the model of index %s runs on device %s", message["name"], message["device"])

    def _memory_of(self, name: str) -> WeightMemory:
        """Of a device, which may have several names: "cuda" is "cuda:0"."""
        device = torch.empty(0, device=name).device
        if device not in self._memories:
            self._memories[device] = WeightMemory(self._model_bytes or free_bytes(device))
        return self._memories[device]

    def _sketch(self, message: Message) -> tuple[Message, list[np.ndarray]]:
        def go_on() -> None:
            if message["id"] in self._cancelled:
                raise CancelledError

        task, examples, results = self._tasks[message["key"]], dict[int, Any](), dict[int, Message]()
        for place, item in enumerate(message["items"]):
            go_on()  # before each, as long JSON takes long to read
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
    model_bytes: int | None,
    model_threads: int | None,
    max_json_depth: int,
    log_format: LogFormat,
    log_level: str,
) -> None:
    # Threads that wait for each other at every operation lose more by one that has no processor than it does for them.
    torch.set_num_threads(model_threads or max(1, torch.get_num_threads() - 1))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    configure_logs(log_format, log_level)
    give_back_freed_memory()
    connection = socket.socket(fileno=descriptor)
    ModelProcess(connection, model_bytes=model_bytes, max_json_depth=max_json_depth).run()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
