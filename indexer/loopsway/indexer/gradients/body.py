"""Which modules of a model are the loop's body, and which parameters are attributed to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..config import Loop
from .steps import Steps


class Body:
    """The loop's body in one model.

    Args:
        model: any module.
        loop: what to find in it.

    Attributes:
        parameters: what is attributed to, by name, in the order of `named_modules()`; a parameter with several names
            has its first.

    Raises:
        ValueError: the body matches nothing, or owns no trainable parameter.
    """

    def __init__(self, model: nn.Module, loop: Loop) -> None:
        self.loop, self._model = loop, model
        modules = dict(model.named_modules())
        self.roots = dict(_callable(modules, _matches(modules, loop.body)))
        self.marker = _marker(modules, loop.marker)
        self.parameters: dict[str, nn.Parameter] = {}
        in_body = {
            id(parameter) for root in self.roots.values() for parameter in root.parameters() if parameter.requires_grad
        }
        if not in_body:
            raise ValueError(f"loop body {list(loop.body)} owns no parameter that requires a gradient")
        for name, parameter in model.named_parameters():
            if id(parameter) in in_body or (loop.outside and parameter.requires_grad):
                self.parameters[name] = parameter

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def constants(self) -> Iterator[Tensor]:
        """What else is the same for all examples."""
        wanted = {id(parameter) for parameter in self.parameters.values()}
        yield from (parameter for parameter in self._model.parameters() if id(parameter) not in wanted)
        yield from self._model.buffers()

    def steps(self, on_change: Callable[[], None] | None = None) -> Steps:
        """A fresh count of the steps, for one forward pass."""
        return Steps(self.marker, list(self.roots.values()), on_change)

    def check(self, steps: Steps, used_in_steps: bool) -> None:
        """Raises ValueError when a forward pass had no step, or no use of the body's parameters in one."""
        if steps.num_steps == 0:
            raise ValueError(f"the loop's body {list(self.loop.body)} was never entered in the forward pass")
        if not used_in_steps:
            raise ValueError(
                f"the body's parameters were used before any step began: the loop's marker is "
                f"{self.loop.marker or 'the first of ' + str(list(self.loop.body))}; name as marker a module that is "
                "entered first in each step"
            )


def _matches(modules: dict[str, nn.Module], patterns: Sequence[str]) -> list[str]:
    names: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in modules if name == pattern or (name and fnmatchcase(name, pattern))]
        if not found:
            known = ", ".join(name for name in modules if name and name.count(".") < 2)
            raise ValueError(f"loop body {pattern!r} matches no module of the model; it has {known}")
        names.update(dict.fromkeys(found))
    return list(names)


def _callable(modules: dict[str, nn.Module], names: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """A list of modules is never called itself: its members are."""
    for name in names:
        module = modules[name]
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield from _callable(modules, [f"{name}.{key}" for key, _ in module.named_children()])
        else:
            yield name, module


def _marker(modules: dict[str, nn.Module], name: str | None) -> nn.Module | None:
    if name is not None and name not in modules:
        raise ValueError(f"loop marker {name!r} is no module of the model; it has {', '.join(filter(None, modules))}")
    return None if name is None else modules[name]
