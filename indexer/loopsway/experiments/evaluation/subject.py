"""What is evaluated: a model, its training, training examples and queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a model is trained, with AdamW.

    Attributes:
        num_steps: of the optimizer.
        batch_size: examples a step, before those that are left out.
        learning_rate: the largest; it rises over the first tenth of the steps and falls to a twentieth over the last
            third.
        weight_decay: of AdamW.
        num_checkpoints: kept along the way, evenly spread.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    num_checkpoints: int

    def learning_rate_at(self, step: int) -> float:
        rising = (step + 1) / (0.1 * self.num_steps)
        falling = (self.num_steps - step) / (self.num_steps / 3)
        return self.learning_rate * max(0.05, min(1.0, rising, falling))

    def checkpoint_steps(self) -> list[int]:
        """Before which steps a checkpoint is taken: in the middle of equal parts of the training."""
        part = self.num_steps / self.num_checkpoints
        return [int(part * (number + 0.5)) for number in range(self.num_checkpoints)]


class Subject(ABC):
    """A small model that can be trained in seconds.

    Attributes:
        name: for people.
        course: of its training.
        body: modules of the loop, as in `Loop`.
        rows: N training examples.
        queries: Q examples that are in no training.
    """

    name: str
    course: Course
    body: Sequence[str]
    rows: Sequence[Any]
    queries: Sequence[Any]

    @abstractmethod
    def new_model(self) -> nn.Module:
        """With weights drawn from torch's global random state."""

    @abstractmethod
    def collate(self, examples: Sequence[Any]) -> Any:
        """A batch for `losses`; a longer list of the same examples pads no further."""

    @abstractmethod
    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Each example's own loss, [B]."""

    @abstractmethod
    def mislabelled(self, example: Any) -> Any:
        """The same example with a wrong label."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What tells this subject from another, as JSON: trainings of another are never used again."""
