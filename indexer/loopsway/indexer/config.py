"""What a user chooses about an index: the loop, the sketch, the approximate search and the checkpoints.

Each class is frozen, validated when made, stored with the index as JSON and compared when it is opened.
This file knows no torch: a configuration can be read anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

LayerPath = Literal["auto", "product", "fourier"]
Resolve = Literal["query_step", "train_step", "same_step"]

BITS = (1, 2, 4, 8, 16, 32)
MIN_WIDTH, MAX_WIDTH = 64, 1 << 20
ROTATIONS = 2


@dataclass(frozen=True, kw_only=True)
class Loop:
    """Which modules are the loop's body, and which of them begins a step.

    Attributes:
        body: module names or globs (`"block"`, `"layers.*"`), matched against `model.named_modules()`. Every
            parameter-owning module at or below a match is captured.
        marker: name of the module whose every call begins a new step. None: the first module matched by `body` that
            is entered in a forward.
        outside: attribute to every trainable parameter of the model, not to the body's alone: two more slots follow the
            steps, `before` the first step and `after` the last call of a body module, and the sum over all slots is
            the whole model's gradient.
    """

    body: Sequence[str]
    marker: str | None = None
    outside: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.body, str):
            raise TypeError(f'Loop(body={self.body!r}) is one string; write a list: body=["{self.body}"]')
        body = tuple(self.body)
        if not body or not all(isinstance(name, str) and name for name in body):
            raise ValueError(f"Loop body is {list(body)!r}, expected one or more module names or globs")
        object.__setattr__(self, "body", body)

    def to_dict(self) -> dict[str, Any]:
        return {"body": list(self.body), "marker": self.marker, "outside": self.outside}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Loop:
        return cls(body=data["body"], marker=data["marker"], outside=data["outside"])


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    """How gradients are sketched and how finished sketches are stored.

    Attributes:
        width: floats in a sketch before coding, a power of two. None: exact, unsketched gradients, for tests on small
            models; such a sketcher can't build an index.
        bits: stored bits a coordinate, one of 1, 2, 4, 8, 16, 32. At equal bytes, wide and low-bit has the smaller
            error.
        seed: of every hash and of the rotation.
        layer_path: how linear layers are sketched. "auto" lets the planner choose for each layer; the others force
            one path. The two give the same sketch to rounding.
        optimizer_aware: scale every gradient entry by (sqrt(v) + optimizer_epsilon)^(-1/2), with Adam's second moment v
            at the checkpoint, so that influences are of an Adam step and not of plain SGD.
        optimizer_epsilon: Adam's.
        rotations: of a finished sketch before it is coded to few bits, 1 to 3. With one, as in indices that were built
            before there was a choice, estimates from sign bits are biased where a handful of entries are all of a
            gradient.
    """

    width: int | None = 8192
    bits: int = 1
    seed: int = 0
    layer_path: LayerPath = "auto"
    optimizer_aware: bool = False
    optimizer_epsilon: float = 1e-8
    rotations: int = ROTATIONS

    def __post_init__(self) -> None:
        if self.width is not None:
            in_range = MIN_WIDTH <= self.width <= MAX_WIDTH
            if not in_range or self.width & (self.width - 1):
                raise ValueError(
                    f"width is {self.width}, expected a power of two from {MIN_WIDTH} to {MAX_WIDTH} (8192 is the "
                    "default), or None for exact gradients"
                )
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits}, expected one of {', '.join(map(str, BITS))}")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed is {self.seed}, expected 0 <= seed < 2**64")
        if self.layer_path not in get_args(LayerPath):
            raise ValueError(f"layer_path is {self.layer_path!r}, expected one of {get_args(LayerPath)}")
        if not 1 <= self.rotations <= 3:
            raise ValueError(f"rotations is {self.rotations}, expected 1 to 3 (2 is the default)")
        if not 0 < self.optimizer_epsilon < 1:
            raise ValueError(
                f"optimizer_epsilon is {self.optimizer_epsilon}, expected 0 < epsilon < 1, such as Adam's 1e-8"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SketchConfig:
        return cls(**{"rotations": 1, **data})  # that of plans which don't say


@dataclass(frozen=True, kw_only=True)
class Approximation:
    """How an index can be searched without reading every code, and how good that must be.

    Attributes:
        factory: a FAISS factory string, such as "IVF256,SQ8". None: an exhaustive kind that fits the codes' bits.
        recall_floor: the least recall@10, from 0 to 1, that the build has to measure for either sign of every slot.
    """

    factory: str | None = None
    recall_floor: float = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.recall_floor <= 1:
            raise ValueError(f"recall_floor is {self.recall_floor}, expected a share from 0 to 1, such as 0.99")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Approximation:
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One set of the model's weights along its training.

    Attributes:
        name: unique among a task's checkpoints; part of the key of its hashes.
        learning_rate: eta of the optimizer at this checkpoint, > 0; influences are weighted by it.
        path: file or directory of the weights, for the task's own use. Its content is digested into the build's plan
            when it is a file.
    """

    name: str
    learning_rate: float
    path: str | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("a checkpoint's name is empty; give each checkpoint a unique name")
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"checkpoint {self.name!r} has learning_rate {self.learning_rate}, expected a number > 0")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Checkpoint:
        return cls(**data)
