"""The loop of a Hugging Face model, from one line of text: names and globs, separated by commas, and ranges of layers.

`model.layers.8-27` stands for model.layers.8 to model.layers.27, both included, and its first layer begins a step.
Knows the names of a model's modules and nothing of weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from loopsway.indexer.config import Loop
from loopsway.indexer.task import TaskError

RANGE = re.compile(r"(?P<list>.+)\.(?P<first>\d+)-(?P<last>\d+)(?P<inside>(\..+)?)")


def read_loop(
    text: str | Sequence[str] | None, model: nn.Module, *, marker: str | None, outside: bool, prefix: str = ""
) -> Loop:
    """The loop that the text describes.

    Args:
        text: such as "model.layers.8-27, model.norm", or a list of such parts.
        model: whose modules the ranges are checked against; its weights may be on the meta device.
        marker: None: the first layer of the first range; without any range, what `Loop` takes by itself.
        outside: as in `Loop`.
        prefix: what the names begin with once the model is wrapped in an adapter; names may be written without it.

    Raises:
        TaskError: no part is named, or a range is not one of the model's; the model's layer lists are told.
    """
    parts = [part.strip() for part in (text.split(",") if isinstance(text, str) else text or ())]
    parts = [part.removeprefix(prefix) for part in parts if part]
    if not parts:
        raise TaskError(
            f"no loop was named: say which layers are applied again and again, such as loop={_example(model)!r} "
            f"(--loop on the command line). {_lists(model)}"
        )
    body: list[str] = []
    for part in parts:
        names = _expanded(part, model)
        if len(names) > 1 and marker is None:
            marker = names[0]
        body += names
    return Loop(
        body=[prefix + name for name in body],
        marker=None if marker is None else prefix + marker.removeprefix(prefix),
        outside=outside,
    )


def _expanded(part: str, model: nn.Module) -> list[str]:
    match = RANGE.fullmatch(part)
    if match is None:
        return [part]
    name, first, last = match["list"], int(match["first"]), int(match["last"])
    count = _layer_lists(model).get(name)
    if count is None:
        raise TaskError(f"loop range {part!r}: the model has no list of layers {name!r}. {_lists(model)}")
    if not first <= last < count:
        raise TaskError(
            f"loop range {part!r}: {name} has {count} layers, {name}.0 to {name}.{count - 1}; write first-last, both "
            "included"
        )
    return [f"{name}.{number}{match['inside']}" for number in range(first, last + 1)]


def _layer_lists(model: nn.Module) -> dict[str, int]:
    """Lengths of the model's lists of modules, by name."""
    return {name: len(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}


def _lists(model: nn.Module) -> str:
    modules = dict(model.named_modules())
    kinds = {name: type(modules[f"{name}.0"]).__name__ for name, count in _layer_lists(model).items() if count}
    if not kinds:
        return f"It has no list of layers; its modules are {', '.join(name for name, _ in model.named_children())}"
    listed = [f"{name} ({count} x {kinds[name]})" for name, count in _layer_lists(model).items() if count]
    return f"The model's lists of layers are {', '.join(listed[:8])}"


def _example(model: nn.Module) -> str:
    longest = max(_layer_lists(model).items(), key=lambda item: item[1], default=None)
    return "model.layers.0-3" if longest is None else f"{longest[0]}.0-{longest[1] - 1}"
