"""What a task's losses must be, and what plain autograd says of them.

B examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Losses = Callable[[nn.Module, Any], Tensor]


class NonFiniteError(ValueError):
    """Losses or gradients of some examples are infinite or not a number.

    Attributes:
        positions: of those examples in what was given.
        reason: "loss" or "gradient", and at which checkpoint if that is known, for people.
    """

    def __init__(self, positions: Sequence[int], reason: str, values: Sequence[float] = ()) -> None:
        self.positions, self.reason = tuple(positions), reason
        shown = f": {list(values)[:8]}" if values else ""
        super().__init__(f"the {reason} of examples {list(positions)[:8]} of the batch is not finite{shown}")


def check_losses(values: Any, num_steps: int) -> None:
    """Raises ValueError for what is not one finite loss for each example that depends on the loop."""
    if not isinstance(values, Tensor) or values.dim() != 1:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"losses(model, batch) gave {shape}, expected one loss for each example: a tensor of [B]")
    if not values.isfinite().all():
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        raise NonFiniteError(bad, "loss", values[bad].tolist())
    if not values.requires_grad and num_steps:
        raise ValueError("the losses depend on no step of the loop: every step ran under no_grad or was detached")


def check_finite(sketches: Tensor) -> None:
    """Raises NonFiniteError for examples of which a sketch [B, S, W] has a value that is not finite."""
    finite = sketches.flatten(1).sum(1).isfinite()  # a sum that overflows is too large for float32 as well
    if not finite.all():
        raise NonFiniteError((~finite).nonzero().flatten().tolist(), "gradient")


def dense_gradients(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], losses: Losses, batch: Any
) -> dict[str, Tensor]:
    """Of the batch's last example, by plain autograd; without those that its loss does not depend on."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        with torch.enable_grad():  # not autograd.grad: reentrant checkpointing refuses it
            losses(model, batch)[-1].backward()
        return {name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient meanwhile, so that the backward pass computes only activations' gradients."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
