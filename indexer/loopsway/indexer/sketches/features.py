"""From a task's examples to their sketches over all its checkpoints.

B examples, K checkpoints, S steps, W width.

I[n,s; q,t] = sum_k eta_k <phi[n,k,s], phi[q,k,t]> (Kaissis et al. 2026, arXiv 2602.10097; TracIn: Pruthi et al. 2020)
is estimated by one inner product, because each checkpoint's sketch is scaled by sqrt(eta_k), hashed on its own and
added to the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Checkpoint, Loop, SketchConfig
from ..gradients.losses import NonFiniteError, check_finite
from ..task import Task, TaskError
from .capture import Captured
from .gradient_sketcher import GradientSketcher
from .hashes import CONSTRUCTION
from .plan import PlanEntry
from .sketcher import StepSketcher
from .weights import WeightMemory


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

    Args:
        task: whose examples and losses.
        config: of the sketches; width=None is refused.
        device: a torch device name.
        batch_size: examples in one forward and backward, at the most.
        memory: that the checkpoints' models share, with those of other sketchers perhaps; one that has left it is
            loaded again when its turn comes. None: all stay on the device. The sketches are the same.

    Raises:
        TaskError: the task has no checkpoints, two of one name, or checkpoints of different parameters.
        ValueError: the loop can't be attributed.
    """

    def __init__(
        self,
        task: Task,
        config: SketchConfig | None = None,
        *,
        device: str = "cpu",
        batch_size: int = 32,
        memory: WeightMemory | None = None,
    ) -> None:
        self.config = config or SketchConfig()
        if self.config.width is None:
            raise ValueError("width is None: exact gradients are for tests with StepSketcher; give a width")
        self._task, self._device, self.batch_size = task, torch.device(device), batch_size
        self.checkpoints = _checked_checkpoints(task)
        self._memory = memory or WeightMemory()
        self._sketchers: list[StepSketcher] = []
        self._sizes: list[int] = []  # in bytes, also while the weights are not in memory
        for checkpoint in self.checkpoints:
            self._add(checkpoint)
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

    def plan(self) -> list[PlanEntry]:
        """How each parameter was attributed to in the last batch, at the last checkpoint."""
        return self._sketchers[-1].plan()

    def gradient_sketcher(self) -> GradientSketcher:
        """Sketches queries that come as gradients as `sketch` does those that come as examples; runs no model.

        Thread-safe, unless optimizer_aware=True: then its pieces count as calls of this sketcher's.
        """
        names = [checkpoint.name for checkpoint in self.checkpoints]
        hashes = {name: each.hashes for name, each in zip(names, self._sketchers, strict=True)}
        scales_of = (lambda name: self._at(names.index(name)).scales) if self.config.optimizer_aware else None
        return GradientSketcher(
            self.parameters, self.checkpoints, self.config, hashes, scales_of=scales_of, device=self._device
        )

    def close(self) -> None:
        """Frees the models; the next call loads them again."""
        for sketcher in self._sketchers:
            self._memory.drop(sketcher)

    def sketch(self, examples: Sequence[Any], *, go_on: Callable[[], object] | None = None) -> ExampleSketches:
        """Sketches of these examples, in batches of at most `batch_size`.

        Args:
            examples: of the task.
            go_on: called before each costly part, a batch's forward and backward at one checkpoint. What it raises
                ends the call.

        Raises:
            NonFiniteError: an example's loss or gradient is not finite.
            ValueError: examples ran different numbers of steps.
        """
        if not examples:
            raise ValueError("no examples to sketch; give at least one")
        parts = []
        for start in range(0, len(examples), self.batch_size):
            try:
                parts.append(self._sketch_batch(examples[start : start + self.batch_size], go_on))
            except NonFiniteError as error:
                raise NonFiniteError([start + place for place in error.positions], error.reason) from error
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

    def _add(self, checkpoint: Checkpoint) -> None:
        """Makes the sketcher of one more checkpoint, which is expected to be as large as those before."""
        self._memory.make_room(max(self._sizes, default=0))
        model, moments = self._loaded(checkpoint)
        sketcher = StepSketcher(model, self._task.loop, self.config, checkpoint=checkpoint, second_moments=moments)
        self._sketchers.append(sketcher)
        self._sizes.append(sketcher.size_bytes)
        self._memory.hold(sketcher, self._sizes[-1], sketcher.release)

    def _loaded(self, checkpoint: Checkpoint) -> tuple[nn.Module, Mapping[str, Tensor] | None]:
        moments = _second_moments(self._task, self.config, checkpoint)
        return self._task.model(checkpoint).to(self._device).eval(), moments

    def _at(self, place: int) -> StepSketcher:
        """The sketcher of a checkpoint, with its weights in memory."""
        sketcher = self._sketchers[place]
        if not self._memory.use(sketcher):
            self._memory.make_room(self._sizes[place])
            sketcher.restore(*self._loaded(self.checkpoints[place]))
            self._memory.hold(sketcher, self._sizes[place], sketcher.release)
        return sketcher

    def _sketch_batch(self, examples: Sequence[Any], go_on: Callable[[], object] | None) -> ExampleSketches:
        batch = to_device(self._task.collate(examples), self._device)
        total: Tensor | None = None
        values: dict[int, Tensor] = {}
        losses: dict[int, Tensor] = {}
        silent: dict[int, tuple[int, ...]] = {}
        places, num_added = range(len(self.checkpoints)), 0
        # Those in memory come first: in turn, each would push out the one that is needed next.
        for place in sorted(places, key=lambda place: self._sketchers[place] not in self._memory):
            if go_on is not None:
                go_on()
            captured = self._captured(place, batch, len(examples))
            values[place], losses[place] = captured.values, captured.losses.float()
            silent[place] = captured.steps_without_gradient
            while num_added in values:  # added in the checkpoints' order, whichever came first: sums are the same
                total = self._added(total, values.pop(num_added), num_added)
                num_added += 1
        assert total is not None
        return ExampleSketches(
            values=total.cpu(),
            losses=torch.stack([losses[place] for place in places]).cpu(),
            steps_without_gradient=_in_all([silent[place] for place in places]),
        )

    def _captured(self, place: int, batch: Any, size: int) -> Captured:
        """A batch's sketches at one checkpoint, checked."""
        try:
            captured = self._at(place).run(self._task.losses, batch)
            check_finite(captured.values)
        except NonFiniteError as error:
            name = self.checkpoints[place].name
            raise NonFiniteError(error.positions, f"{error.reason} at checkpoint {name!r}") from error
        if len(captured.losses) != size:
            raise TaskError(f"losses gave {len(captured.losses)} values for {size} examples")
        return captured

    def _added(self, total: Tensor | None, values: Tensor, place: int) -> Tensor:
        if total is None:
            return values
        if total.shape != values.shape:
            raise ValueError(
                f"checkpoint {self.checkpoints[place].name!r} ran {values.shape[1]} steps, "
                f"{self.checkpoints[0].name!r} ran {total.shape[1]}: all checkpoints must run the same number"
            )
        return total.add_(values)


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
        "optimizer": config.optimizer_epsilon if config.optimizer_aware else None,
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


def _second_moments(task: Task, config: SketchConfig, checkpoint: Checkpoint) -> Mapping[str, Tensor] | None:
    if not config.optimizer_aware:
        return None
    moments = task.second_moments(checkpoint)
    if moments is None:
        raise TaskError(
            f"optimizer_aware=True needs Adam's second moments, but {type(task).__name__}.second_moments gave none for "
            f"checkpoint {checkpoint.name!r}"
        )
    return moments


def _in_all(steps: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(sorted(set(steps[0]).intersection(*steps[1:])))


def to_device(batch: Any, device: torch.device) -> Any:
    """The same structure with every tensor on the device."""
    move: Callable[[Any], Any] = lambda item: to_device(item, device)  # noqa: E731
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
