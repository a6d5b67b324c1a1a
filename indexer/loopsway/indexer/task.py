"""The Task: what Loopsway needs to know of a model and its training data.

A user writes one class in one file and names it on the command line as `path/to/file.py:ClassName` (or
`package.module:ClassName`). `loopsway.tasks.parity` is the smallest example.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .config import Checkpoint, Loop

SHIPPED = "loopsway.tasks."


class Task(ABC):
    """A model, its checkpoints, its training examples and each example's own loss.

    Attributes:
        loop: the loop's body; a class attribute or a property.
    """

    loop: Loop

    @abstractmethod
    def checkpoints(self) -> Sequence[Checkpoint]:
        """The checkpoints to attribute to, in training order; at least one."""

    @abstractmethod
    def model(self, checkpoint: Checkpoint) -> torch.nn.Module:
        """The model with this checkpoint's weights, in eval mode, on the CPU.

        Weights load from safetensors or `torch.load(weights_only=True)`.
        """

    def second_moments(self, checkpoint: Checkpoint) -> Mapping[str, torch.Tensor] | None:
        """Adam's second moments at this checkpoint by parameter name, for optimizer-aware influence.

        `exp_avg_sq / (1 - beta2**step)`, as Adam uses them.

        None when the checkpoint keeps none. Each has its parameter's shape.
        """
        return None

    @abstractmethod
    def examples(self) -> Sequence[Any]:
        """The training examples: any object with `len()` and `[i]`, in an order that never changes."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Any:
        """A batch of the given examples, batch dimension first: a tensor, or a dict, list or tuple of them.

        Tensors are moved to the model's device by the caller.
        """

    @abstractmethod
    def losses(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        """Each example's own loss, [B]: it must depend on no other example of the batch."""

    def example_from_json(self, obj: Any) -> Any:
        """The example that a query's JSON stands for; raise ValueError when the JSON is not one.

        Called by the service with untrusted input.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define example_from_json: it takes no JSON queries")

    def example_id(self, row: int) -> str:
        """A unique, stable name of the example in this row."""
        return str(row)

    def metadata(self, row: int) -> Mapping[str, Any]:
        """Columns to filter by: str, int, float, bool or None; the same keys for every row."""
        return {}

    def describe(self, row: int) -> str:
        """One line of text that shows the example to a person."""
        return ""


class TaskError(ValueError):
    """A task's code could not be found or loaded, or what it returned breaks the Task's contract."""


def load_task(spec: str, arguments: Mapping[str, Any] | None = None) -> Task:
    """Imports `path/to/file.py:ClassName` or `package.module:ClassName` and makes the task.

    This runs the named file's code: call it with names from the command line, never with one that came over a wire.

    Args:
        spec: where the class is.
        arguments: keyword arguments for its constructor.

    Raises:
        TaskError: no such file, module or class, or its constructor refused the arguments.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise TaskError(f"task {spec!r} names no class; write path/to/file.py:ClassName or package.module:ClassName")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    cls = getattr(module, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise TaskError(f"{place} has no class {name} that derives from loopsway.indexer.Task")
    try:
        return cls(**(arguments or {}))
    except TypeError as error:
        raise TaskError(f"{name} does not take the arguments {dict(arguments or {})}: {error}") from error


def is_shipped(spec: str) -> bool:
    """Whether the task is one of Loopsway's own modules, not a file: its code may run because an index names it."""
    return spec.startswith(SHIPPED) and not spec.rpartition(":")[0].endswith(".py")


def _load_file(path: Path) -> Any:
    if not path.is_file():
        raise TaskError(f"task file {path} does not exist (looked from {Path.cwd()})")
    name = f"loopsway_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise TaskError(f"task file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling workers look the module up by name
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise TaskError(f"task module {name} can't be imported: {error}; for a file, write path/to/file.py") from error
