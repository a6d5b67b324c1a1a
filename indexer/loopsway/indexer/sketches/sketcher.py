"""One checkpoint's `StepSketcher`: from a batch to sketches of every example's gradient at every step.

B examples, S steps, W width, P entries of all parameters.

This file chooses how gradients are come by and checks that they are right; what they are summed up into is the sink's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Checkpoint, Loop, SketchConfig
from ..gradients.forms import Dense
from ..gradients.losses import Losses, dense_gradients
from ..gradients.optimizer import optimizer_scales
from ..gradients.uses import NotFollowedError
from .capture import Capture, Captured, SinkFactory
from .plan import PlanEntry, plan_entries
from .planner import PathCost
from .sketch import DeviceHash, ExactGradients, GradientSink, Sketches
from .untied import run_untied
from .weights import empty, fill, size_of

# Relative disagreement with plain autograd that is rounding: float32, and the half precisions.
CHECK_TOLERANCE, CHECK_TOLERANCE_HALF = 1e-3, 5e-2

_log = logging.getLogger(__name__)


class StepSketcher:
    """Sketches each example's gradient with respect to the loop body as used at each step.

    The first batch is checked against plain autograd: the sketch of one example, summed over steps and what is outside
    them, must be the sketch of that example's own dense gradient. Where they differ a parameter was used where torch's
    functions can't be seen, and from then on the body is untied (`untied.py`): right as well, and much slower. `plan`
    and a log message say so. The check costs one forward and backward, and the first batch is run backwards twice.

    Args:
        model: in eval mode; its device and dtype are used as they are. Parameters with requires_grad=False are left
            out.
        loop: the body.
        config: width=None gives exact gradients, [B, S, P], in the order of `parameters`.
        checkpoint: whose weights the model has, for its hashes and its learning rate. None: learning rate 1.
        second_moments: Adam's, by parameter name, each of its parameter's shape; for optimizer_aware=True.

    Attributes:
        parameters: names and shapes of what is attributed to.
        hashes: of each parameter, by name; none when width=None.
        scales: of each parameter's entries, by name; None unless optimizer_aware=True, and while released.

    Raises:
        ValueError: the body can't be attributed; the module is named.
    """

    def __init__(
        self,
        model: nn.Module,
        loop: Loop,
        config: SketchConfig | None = None,
        *,
        checkpoint: Checkpoint | None = None,
        second_moments: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config or SketchConfig()
        self._capture = Capture(model, loop)
        self.parameters = {name: tuple(parameter.shape) for name, parameter in self._capture.parameters.items()}
        self._checkpoint = checkpoint or _SINGLE
        self._scale = math.sqrt(self._checkpoint.learning_rate)
        self._device = self._capture.body.device
        self._checked_examples = 0
        self._untied_because: str | None = None
        self._costs: Mapping[str, PathCost] | None = None  # of the last batch
        self.scales = optimizer_scales(self._capture.parameters, self.config, second_moments)
        self.hashes: dict[str, DeviceHash] = {}
        if self.config.width is not None:
            self.hashes = DeviceHash.of_parameters(
                self.parameters,
                width=self.config.width,
                seed=self.config.seed,
                checkpoint=self._checkpoint.name,
                device=self._device,
            )

    @property
    def size_bytes(self) -> int:
        """Of the weights, and of what scales their gradients."""
        scales = (self.scales or {}).values()
        return size_of(self._capture.model) + sum(scale.nbytes for scale in scales)

    def release(self) -> None:
        """Frees the weights; what was learned of the model stays. `restore` them before the next batch."""
        empty(self._capture.model)
        self.scales = None

    def restore(self, model: nn.Module, second_moments: Mapping[str, Tensor] | None = None) -> None:
        """Takes the weights of the same checkpoint, loaded anew; arguments as for the constructor.

        Raises:
            TaskError: it has other weights, or is the released one itself.
        """
        fill(self._capture.model, model)
        self.scales = optimizer_scales(self._capture.parameters, self.config, second_moments)

    def sketch(self, losses: Losses, batch: Any) -> Tensor:
        """Sketches of a batch.

        Args:
            losses: `losses(model, batch)` gives each example's own loss, [B].
            batch: for `losses`, on the model's device.

        Returns:
            [B, S, W] float32, scaled by the square root of the learning rate. With Loop(outside=True) two rows more:
            `before` and `after`.

        Raises:
            ValueError: the losses or the model break what attribution needs; the text says what.
        """
        return self.run(losses, batch).values

    def run(self, losses: Losses, batch: Any) -> Captured:
        """As `sketch`, with the losses and the steps without gradient beside the sketches (`values`)."""
        _refuse_randomness(self._capture.model)
        captured = self.captured(losses, batch) if self._checked_examples else None
        if captured is None or self._checked_examples < min(len(captured.losses), 2):
            captured = self._checked(losses, batch)
        captured.values.mul_(self._scale)
        self._costs = getattr(captured.sink, "costs", {})
        return captured

    def plan(self) -> list[PlanEntry]:
        """How each parameter was attributed to in the last batch, with what it cost.

        Raises:
            ValueError: nothing was sketched yet.
        """
        if self._costs is None:
            raise ValueError("there is no plan before the first batch: call sketch(losses, batch) once")
        return plan_entries(self.parameters, self._capture.seen, self._costs, self._untied_because)

    def captured(
        self, losses: Losses, batch: Any, new_sink: SinkFactory | None = None, *, outside: bool | None = None
    ) -> Captured:
        """A run's gradients in any sink, unscaled and unchecked: for what `run` has checked before.

        Args:
            losses: as for `run`.
            batch: as for `run`.
            new_sink: called with (B, number of slots). None: for sketches.
            outside: whether `before` and `after` are wanted; None: as the loop says.
        """
        capture, new_sink = self._capture, new_sink or self._new_sink
        if self._untied_because is None:
            try:
                return capture.run(losses, batch, new_sink, outside=outside)
            except NotFollowedError as error:
                self._untie(str(error))
        wanted = capture.body.loop.outside if outside is None else outside
        return run_untied(capture.model, capture.body, losses, batch, new_sink, outside=wanted)

    def _untie(self, because: str) -> None:
        self._untied_because = because
        _log.warning(
            "the loop body is untied and runs backwards once for each example, about as often as a batch has examples: "
            "%s",
            because,
        )

    def _new_sink(self, batch: int, num_slots: int) -> GradientSink:
        width = self.config.width
        if width is None:
            return ExactGradients(self.parameters, batch, num_slots, device=self._device, scales=self.scales)
        return Sketches(
            self.hashes,
            batch,
            num_slots,
            width=width,
            layer_path=self.config.layer_path,
            device=self._device,
            scales=self.scales,
        )

    def _checked(self, losses: Losses, batch: Any) -> Captured:
        captured = self.captured(losses, batch, outside=True)
        if self._untied_because is None:
            difference = self._difference(losses, batch, captured)
            half = any(parameter.dtype != torch.float32 for parameter in self._capture.parameters.values())
            half = half or self._capture.used_autocast
            if difference > (CHECK_TOLERANCE_HALF if half else CHECK_TOLERANCE):
                self._untie(
                    f"the step gradients of the batch's last example do not add up to its gradient by plain autograd "
                    f"(relative difference {difference:.3g}), so a parameter is used where torch's functions can't be "
                    "seen: by a custom autograd function, or compiled or scripted code"
                )
                captured = self.captured(losses, batch, outside=True)
        self._checked_examples = max(self._checked_examples, len(captured.losses))
        if self._capture.body.loop.outside:
            return captured
        return replace(captured, values=captured.values[:, : captured.num_steps].contiguous())

    def _difference(self, losses: Losses, batch: Any, captured: Captured) -> float:
        """Relative, of the batch's last example from its dense gradient by plain autograd."""
        expected = self._new_sink(1, 1)
        for name, gradient in dense_gradients(self._capture.model, self._capture.parameters, losses, batch).items():
            expected.add(name, 0, Dense(gradient.float().reshape(1, -1)))
        want, got = expected.values[0, 0], captured.values[-1].sum(0)
        return float((got - want).norm()) / max(float(want.norm()), 1e-30)


_SINGLE = Checkpoint(name="single", learning_rate=1.0)


def _refuse_randomness(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not module.training:
            continue
        recurrent = isinstance(module, nn.RNNBase)
        rate = getattr(module, "dropout" if recurrent else "p", 0)
        if (recurrent or type(module).__name__.endswith("Dropout")) and isinstance(rate, float) and rate > 0:
            raise ValueError(
                f"module {name!r}, a {type(module).__name__}, has dropout in training mode: call model.eval() first"
            )
