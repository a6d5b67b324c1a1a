"""From examples to sketches: one checkpoint's `StepSketcher`, and a task's `ExampleSketcher` over all its checkpoints.

B examples, K checkpoints, S steps, W width.

I[n,s; q,t] = sum_k eta_k <phi[n,k,s], phi[q,k,t]> (Kaissis et al. 2026, arXiv 2602.10097; TracIn: Pruthi et al. 2020)
is estimated by one inner product, because each checkpoint's sketch is scaled by sqrt(eta_k), hashed on its own and
added to the others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .capture import Capture, Captured, Losses
from .config import Checkpoint, Loop, SketchConfig
from .gradients import Dense
from .hashes import CONSTRUCTION
from .sketch import DeviceHash, ExactGradients, GradientSink, Sketches
from .task import Task, TaskError

# Relative disagreement with plain autograd that is rounding: float32, and the half precisions.
CHECK_TOLERANCE, CHECK_TOLERANCE_HALF = 1e-3, 5e-2


class StepSketcher:
    """Sketches each example's gradient with respect to the loop body as used at each step.

    The first batch is checked against plain autograd: the sketch of one example, summed over steps, must be the
    sketch of that example's own dense gradient. So a parameter used behind a module's back, a batch dimension that is
    not first and losses that mix examples are errors, not wrong numbers. The check costs one forward and backward.

    Args:
        model: in eval mode; its device and dtype are used as they are. Parameters with requires_grad=False are left
            out.
        loop: the body.
        config: width=None gives exact gradients, [B, S, P], in the order of `parameters`.
        checkpoint: whose weights the model has, for its hashes and its learning rate. None: learning rate 1.

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
    ) -> None:
        self.config = config or SketchConfig()
        self._capture = Capture(model, loop)
        self._checkpoint = checkpoint or _SINGLE
        self._scale = math.sqrt(self._checkpoint.learning_rate)
        self._device = next(iter(self._capture.parameters.values())).device
        self._checked_examples = 0
        self._hashes: dict[str, DeviceHash] = {}
        if self.config.width is not None:
            self._hashes = DeviceHash.of_parameters(
                self._capture.shapes,
                width=self.config.width,
                seed=self.config.seed,
                checkpoint=self._checkpoint.name,
                device=self._device,
            )

    @property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what is attributed to."""
        return self._capture.shapes

    def sketch(self, losses: Losses, batch: Any) -> Tensor:
        """Sketches of a batch.

        Args:
            losses: `losses(model, batch)` gives each example's own loss, [B].
            batch: for `losses`, on the model's device.

        Returns:
            [B, S, W] float32, scaled by the square root of the learning rate.

        Raises:
            ValueError: the losses or the model break what attribution needs; the text says what.
        """
        return self.run(losses, batch).sink.values

    def run(self, losses: Losses, batch: Any) -> Captured:
        """As `sketch`, with the losses and the steps without gradient beside the sketches (`sink.values`)."""
        _refuse_randomness(self._capture.model)
        captured = self._capture.run(losses, batch, self._new_sink)
        size = len(captured.losses)
        if self._checked_examples < min(size, 2):
            self._check(losses, batch, captured)
            self._checked_examples = size
        captured.sink.values.mul_(self._scale)
        return captured

    def _new_sink(self, batch: int, num_steps: int) -> GradientSink:
        width = self.config.width
        if width is None:
            return ExactGradients(self._capture.shapes, batch, num_steps, device=self._device)
        return Sketches(
            self._hashes,
            batch,
            num_steps,
            width=width,
            layer_path=self.config.layer_path,
            device=self._device,
        )

    def _check(self, losses: Losses, batch: Any, captured: Captured) -> None:
        """Compares the batch's last example with its dense gradient by plain autograd."""
        parameters = self._capture.parameters
        with torch.enable_grad():
            loss = losses(self._capture.model, batch)[-1]
            dense = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        expected = self._new_sink(1, 1)
        for name, gradient in zip(parameters, dense, strict=True):
            if gradient is not None:
                expected.add(name, 0, Dense(gradient.float().reshape(1, -1)))
        want, got = expected.values[0, 0], captured.sink.values[-1].sum(0)
        error, norm = float((got - want).norm()), float(want.norm())
        half = any(parameter.dtype != torch.float32 for parameter in parameters.values()) or torch.is_autocast_enabled()
        if error > (CHECK_TOLERANCE_HALF if half else CHECK_TOLERANCE) * norm:
            raise ValueError(
                f"the step gradients of the batch's last example do not add up to its gradient by plain autograd "
                f"(relative difference {error / max(norm, 1e-30):.3g}). A body parameter is used outside its module's "
                "own forward (tied or functional use), the batch is not the first dimension of a body module's input, "
                "or one example's loss depends on another's"
            )


_SINGLE = Checkpoint(name="single", learning_rate=1.0)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleSketches:
    """Sketches of examples, all checkpoints added.

    Attributes:
        values: [B, S, W] float32, on the CPU, before rotation and coding.
        losses: [K, B] float32, each example's loss at each checkpoint.
        steps_without_gradient: steps that had none at every checkpoint: their zeros are an artefact of training.
    """

    values: Tensor
    losses: Tensor
    steps_without_gradient: tuple[int, ...]


class ExampleSketcher:
    """Sketches a task's examples over all its checkpoints. Not thread-safe: one caller at a time.

    The models of all checkpoints stay loaded on the device.

    Args:
        task: whose examples and losses.
        config: of the sketches; width=None is refused.
        device: a torch device name.
        batch_size: examples in one forward and backward, at the most.

    Raises:
        TaskError: the task has no checkpoints, two of one name, or checkpoints of different parameters.
        ValueError: the loop can't be attributed.
    """

    def __init__(
        self, task: Task, config: SketchConfig | None = None, *, device: str = "cpu", batch_size: int = 32
    ) -> None:
        self.config = config or SketchConfig()
        if self.config.width is None:
            raise ValueError("width is None: exact gradients are for tests with StepSketcher; give a width")
        self._task, self._device, self.batch_size = task, torch.device(device), batch_size
        self.checkpoints = _checked_checkpoints(task)
        self._models = [task.model(checkpoint).to(self._device).eval() for checkpoint in self.checkpoints]
        self._sketchers = [
            StepSketcher(model, task.loop, self.config, checkpoint=checkpoint)
            for model, checkpoint in zip(self._models, self.checkpoints, strict=True)
        ]
        self.parameters = self._sketchers[0].parameters
        for checkpoint, sketcher in zip(self.checkpoints, self._sketchers, strict=True):
            if sketcher.parameters != self.parameters:
                raise TaskError(
                    f"checkpoint {checkpoint.name!r} has other loop parameters than {self.checkpoints[0].name!r}: "
                    "all checkpoints of an index must be of one model"
                )

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.config, self._task.loop, self.parameters, self.checkpoints)

    def sketch(self, examples: Sequence[Any]) -> ExampleSketches:
        """Sketches of these examples, in batches of at most `batch_size`.

        Raises:
            ValueError: an example's loss is not finite, or examples ran different numbers of steps.
        """
        if not examples:
            raise ValueError("no examples to sketch; give at least one")
        parts = [
            self._sketch_batch(examples[start : start + self.batch_size])
            for start in range(0, len(examples), self.batch_size)
        ]
        steps = {part.values.shape[1] for part in parts}
        if len(steps) > 1:
            raise ValueError(f"examples of one call ran different numbers of steps, {sorted(steps)}: fix the task's "
                             "loop count, or sketch them apart")  # fmt: skip
        if len(parts) == 1:
            return parts[0]
        return ExampleSketches(
            values=torch.cat([part.values for part in parts]),
            losses=torch.cat([part.losses for part in parts], dim=1),
            steps_without_gradient=_in_all([part.steps_without_gradient for part in parts]),
        )

    def _sketch_batch(self, examples: Sequence[Any]) -> ExampleSketches:
        batch = _to_device(self._task.collate(examples), self._device)
        total: Tensor | None = None
        losses, silent = [], []
        for checkpoint, sketcher in zip(self.checkpoints, self._sketchers, strict=True):
            captured = sketcher.run(self._task.losses, batch)
            if len(captured.losses) != len(examples):
                raise TaskError(f"losses gave {len(captured.losses)} values for {len(examples)} examples")
            values = captured.sink.values
            if total is not None and total.shape != values.shape:
                raise ValueError(
                    f"checkpoint {checkpoint.name!r} ran {values.shape[1]} steps, {self.checkpoints[0].name!r} ran "
                    f"{total.shape[1]}: all checkpoints must run the same number"
                )
            total = values if total is None else total.add_(values)
            losses.append(captured.losses.float())
            silent.append(captured.steps_without_gradient)
        assert total is not None
        return ExampleSketches(
            values=total.cpu(), losses=torch.stack(losses).cpu(), steps_without_gradient=_in_all(silent)
        )


def fingerprint(
    config: SketchConfig, loop: Loop, parameters: Mapping[str, tuple[int, ...]], checkpoints: Sequence[Checkpoint]
) -> str:
    """Equal for two sketches exactly when their inner product means something; hex, 32 digits.

    The bits and the path are left out: they don't change a query's sketch. So is a checkpoint's path: weights move.
    """
    facts = {
        "construction": CONSTRUCTION,
        "width": config.width,
        "seed": config.seed,
        "loop": loop.to_dict(),
        "parameters": {name: list(shape) for name, shape in parameters.items()},
        "checkpoints": [[checkpoint.name, checkpoint.learning_rate] for checkpoint in checkpoints],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def _checked_checkpoints(task: Task) -> tuple[Checkpoint, ...]:
    checkpoints = tuple(task.checkpoints())
    names = [checkpoint.name for checkpoint in checkpoints]
    if not checkpoints:
        raise TaskError(f"{type(task).__name__}.checkpoints() is empty; give at least one")
    if len(set(names)) < len(names):
        raise TaskError(f"checkpoint names are {names}; give each checkpoint its own")
    return checkpoints


def _in_all(steps: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted(set(steps[0]).intersection(*steps[1:])))


def _to_device(batch: Any, device: torch.device) -> Any:
    """The same structure with every tensor on the device."""
    move: Callable[[Any], Any] = lambda item: _to_device(item, device)  # noqa: E731
    match batch:
        case Tensor():
            return batch.to(device)
        case dict():
            return {key: move(value) for key, value in batch.items()}
        case list() | tuple() if not hasattr(batch, "_fields"):
            return type(batch)(map(move, batch))
        case tuple():
            return type(batch)(*map(move, batch))
        case _:
            return batch


def _refuse_randomness(model: nn.Module) -> None:
    for name, module in model.named_modules():
        rate = getattr(module, "p", 0)
        if module.training and type(module).__name__.endswith("Dropout") and isinstance(rate, float) and rate > 0:
            raise ValueError(f"module {name!r} is {type(module).__name__} in training mode: call model.eval() first")
