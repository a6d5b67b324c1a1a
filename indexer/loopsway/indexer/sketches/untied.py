"""The last resort, right for any model: the body's parameters untied step by step, one backward for each example.

Whenever a step begins, fresh copies of the parameters take their places in the modules, so each copy's gradient is that
step's. Every example needs a backward pass of its own through the whole batch, with all weights' gradients: for B
examples about B times the cost. `StepSketcher` comes here when a parameter is used where torch's functions can't be
seen (a custom autograd function, compiled or scripted code), or by a function that can't be split among the examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients.body import Body
from ..gradients.forms import Dense
from ..gradients.losses import Losses, check_losses
from ..gradients.steps import Moment, Steps
from .capture import Captured, SinkFactory


class _Copies:
    """The copies of the parameters, a set for each stretch of the forward pass."""

    def __init__(self, model: nn.Module, body: Body) -> None:
        self._originals = body.parameters
        names = {id(parameter): name for name, parameter in body.parameters.items()}
        self._places = [
            (module, key, names[id(parameter)])
            for module in model.modules()
            for key, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in names
        ]
        self.steps: Steps | None = None
        self.sets: list[tuple[Moment, dict[str, nn.Parameter]]] = []

    def renew(self) -> None:
        assert self.steps is not None
        copies = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in self._originals.items()}
        self.sets.append((self.steps.note(), copies))
        self._install(copies)

    def _install(self, parameters: dict[str, nn.Parameter]) -> None:
        for module, key, name in self._places:
            setattr(module, key, parameters[name])

    @contextmanager
    def installed(self) -> Iterator[None]:
        handles = [module.register_forward_pre_hook(self._refuse_recomputation) for module, _, _ in self._places]
        try:
            self.renew()
            yield
        finally:
            self._install(self._originals)
            for handle in handles:
                handle.remove()

    def _refuse_recomputation(self, *_: Any) -> None:
        assert self.steps is not None
        if not self.steps.in_forward:
            raise ValueError(
                "the model runs parts of its forward again in the backward pass, and uses its parameters where they "
                "can't be followed: turn activation checkpointing off (for a Hugging Face model: "
                "model.gradient_checkpointing_disable())"
            )


def run_untied(
    model: nn.Module, body: Body, losses: Losses, batch: Any, new_sink: SinkFactory, *, outside: bool
) -> Captured:
    """As `Capture.run`."""
    copies = _Copies(model, body)
    steps = copies.steps = body.steps(on_change=copies.renew)
    with torch.enable_grad(), steps.watched(), copies.installed():
        values = losses(model, batch)
        check_losses(values, steps.num_steps)
        body.check(steps, used_in_steps=True)
        steps.begin_backward()
        slots = steps.num_steps + 2 * outside
        sink, with_gradient = new_sink(len(values), slots), set[int]()
        for example, value in enumerate(values):
            one = new_sink(1, slots)
            for name, slot, gradient in _gradients(copies, value, outside):
                one.add(name, slot, Dense(gradient.reshape(1, -1).float()))
                with_gradient.add(slot)
            sink.values[example] = one.values[0]
    return Captured(
        losses=values.detach(),
        values=sink.values,
        sink=sink,
        num_steps=steps.num_steps,
        steps_without_gradient=tuple(sorted(set(range(steps.num_steps)) - with_gradient)),
    )


def _gradients(copies: _Copies, value: Tensor, outside: bool) -> Iterator[tuple[str, int, Tensor]]:
    """Of one example's loss: parameter, slot and gradient, for each set of copies."""
    assert copies.steps is not None
    wanted = [
        (name, slot, copy)
        for moment, parameters in copies.sets
        if (slot := copies.steps.slot(moment, outside=outside)) is not None
        for name, copy in parameters.items()
    ]
    found = torch.autograd.grad(value, [copy for _, _, copy in wanted], retain_graph=True, allow_unused=True)
    for (name, slot, _), gradient in zip(wanted, found, strict=True):
        if gradient is not None:
            yield name, slot, gradient
