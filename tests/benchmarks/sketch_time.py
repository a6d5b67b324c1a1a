"""Time of sketching a batch, in parts, against a plain step and the reference; and how that time grows.

A plain step is one forward and backward that gives every parameter's gradient of the summed losses. Everything is
timed in turns, in one process, on one batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from measurement import markdown_table
from sdi import ProjectedTracInSDI
from sketch_accuracy import ready_sketcher
from sketch_models import Workload, workload
from torch import Tensor, nn

from loopsway.experiments.looped_gpt import GPTTask
from loopsway.experiments.timing import median_seconds
from loopsway.indexer import SketchConfig
from loopsway.indexer.gradients.forms import Gradient, OuterProduct
from loopsway.indexer.sketches.capture import Capture
from loopsway.indexer.sketches.coding import code_examples

PROJECTIONS = (512, 2048)  # the reference's floats for each tensor; 2048 is its default
INPUT = "places.weight"  # of every model: its gradient is a sum over the batch, next to nothing

TIME_HEADER = (
    "model", "plain, ms", "body's gradients alone", "no parameter's", "engine, nothing kept", "products", "sketches",
    "rotation + coding", "all", *(f"reference, m={m}" for m in PROJECTIONS), "reference / ours",
)  # fmt: skip
TIME_LEGEND = """
Multiples of the plain step of the same batch: all parameters' gradients. *No parameter's*: forward and activations'
backward, no hook. *Engine, nothing kept*: the same through ours, with the gradients' factors dropped. *Products*: with
each example's gradients multiplied out and dropped. *Sketches*: at the default width. *All*: with rotation and coding.
*Reference / ours*: the reference at its default of 2048 floats for each tensor, over *all*.
"""


class _Ignore:
    """A sink that drops the gradients: what remains is the engine and the activations' backward."""

    values = torch.zeros(0)

    def add(self, parameter: str, step: int, gradient: Gradient) -> None:
        pass


class _MultiplyOut(_Ignore):
    """A sink that multiplies each example's gradients out and drops them: what remains to add is the scatter."""

    def add(self, parameter: str, step: int, gradient: Gradient) -> None:
        if isinstance(gradient, OuterProduct):
            torch.bmm(gradient.left.transpose(1, 2), gradient.right)


@dataclass(frozen=True, eq=False)
class Subject:
    """A workload with its model and one batch."""

    workload: Workload
    task: GPTTask
    model: nn.Module
    batch: Tensor

    @classmethod
    def of(cls, workload: Workload, texts: Sequence[str]) -> Subject:
        task = workload.task(texts)
        return cls(workload, task, task.model(task.checkpoints()[0]), task.collate(texts[: workload.shape.batch]))

    def plain(self) -> None:
        self.model.zero_grad()
        self.task.losses(self.model, self.batch).sum().backward()

    def body_alone(self) -> None:
        """Gradients of the loop's body, no other parameter's."""
        with self._trainable(lambda name: name.startswith(self.task.body + ".")):
            self.plain()

    def no_parameters(self) -> None:
        """Forward and activations' backward, without any hook."""
        with self._trainable(lambda name: name == INPUT):
            self.plain()

    def sketch_call(self, config: SketchConfig) -> Callable[[], Tensor]:
        sketcher = ready_sketcher(self.task, self.model, config, self.batch)
        return partial(sketcher.sketch, self.task.losses, self.batch)

    def capture_call(self, sink: _Ignore) -> Callable[[], Any]:
        capture = Capture(self.model, self.task.loop)
        capture.run(self.task.losses, self.batch[:2], lambda *_: sink)  # learns the model, as a sketcher does
        return lambda: capture.run(self.task.losses, self.batch, lambda *_: sink)

    def reference_call(self, projection: int) -> Callable[[], Any]:
        """On a copy of the model: the reference's hooks would slow the other calls."""
        model = copy.deepcopy(self.model)
        body = model.get_submodule(self.task.body)
        estimator = ProjectedTracInSDI(model=model, target_modules=body, projection_size=projection)
        return partial(estimator.featurize_loader, loader=[self.batch], loss_fn=self.task.losses)

    @contextmanager
    def _trainable(self, wanted: Callable[[str], bool]) -> Iterator[None]:
        frozen = [parameter for name, parameter in self.model.named_parameters() if not wanted(name)]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)


def time_row(subject: Subject, repeats: int) -> tuple[str, ...]:
    """The parts of one workload, as multiples of its plain step."""
    config = SketchConfig()
    sketch = subject.sketch_call(config)
    finished = sketch()
    calls: dict[str, Callable[[], Any]] = {
        "plain": subject.plain,
        "body": subject.body_alone,
        "none": subject.no_parameters,
        "engine": subject.capture_call(_Ignore()),
        "products": subject.capture_call(_MultiplyOut()),
        "sketch": sketch,
        "coding": partial(code_examples, finished, seed=config.seed, bits=config.bits),
    }
    for projection in PROJECTIONS:
        calls[f"m={projection}"] = subject.reference_call(projection)
    seconds = median_seconds(calls, repeats)
    seconds["all"] = seconds["sketch"] + seconds["coding"]
    shares = {name: value / seconds["plain"] for name, value in seconds.items()}
    parts = ("body", "none", "engine", "products", "sketch", "coding", "all")
    cells = [f"{shares[name]:.2f}" for name in parts]
    reference = [f"{shares[f'm={projection}']:.2f}" for projection in PROJECTIONS]
    faster = shares[f"m={PROJECTIONS[-1]}"] / shares["all"]
    return (str(subject.workload), f"{1e3 * seconds['plain']:.0f}", *cells, *reference, f"{faster:.1f}")


def growth_table(texts: Sequence[str], repeats: int, *, smoke: bool) -> str:
    """Time of a plain step and of sketches against each size, on (a), all others at their own."""
    base = workload("a", smoke=smoke)
    if not smoke:
        base = base.sized(batch=8)
    factors = (0.5, 1) if smoke else (0.25, 0.5, 1, 2, 4)
    shape, rows = base.shape, []
    for name, key, middle in (
        ("B", "batch", shape.batch),
        ("steps", "num_steps", shape.num_steps),
        ("T", "num_bytes", shape.num_bytes),
    ):
        sizes = [round(factor * middle) for factor in factors]
        subjects = {size: Subject.of(base.sized(**{key: size}), texts) for size in sizes}
        rows += _growth_rows(name, subjects, repeats)
    return markdown_table(("grows", "to", "plain, ms", "sketches, ms", "ms for each", "sketches / plain"), rows)


def _growth_rows(name: str, subjects: dict[int, Subject], repeats: int) -> list[tuple[str, ...]]:
    calls: dict[str, Callable[[], Any]] = {}
    for size, subject in subjects.items():
        calls[f"plain {size}"] = subject.plain
        calls[f"sketch {size}"] = subject.sketch_call(SketchConfig(layer_path="product"))
    seconds = median_seconds(calls, repeats)
    rows = []
    for size in subjects:
        plain, sketch = 1e3 * seconds[f"plain {size}"], 1e3 * seconds[f"sketch {size}"]
        rows.append((name, str(size), f"{plain:.0f}", f"{sketch:.0f}", f"{sketch / size:.2f}", f"{sketch / plain:.2f}"))
    return rows


def width_growth_table(texts: Sequence[str], repeats: int, *, smoke: bool) -> str:
    """Time against W of the product path, of the planner's choice, and of rotation and coding, on (a)."""
    subject = Subject.of(workload("a", smoke=smoke), texts)
    widths = (256, 1024) if smoke else (256, 1024, 4096, 8192, 16384, 32768, 65536)
    calls: dict[str, Callable[[], Any]] = {"plain": subject.plain}
    for width in widths:
        product = subject.sketch_call(SketchConfig(width=width, layer_path="product"))
        calls[f"product {width}"] = product
        calls[f"auto {width}"] = subject.sketch_call(SketchConfig(width=width))
        calls[f"coding {width}"] = partial(code_examples, product(), seed=0, bits=1)
    seconds = median_seconds(calls, repeats)
    rows = []
    for width in widths:
        shares = (seconds[f"{name} {width}"] / seconds["plain"] for name in ("product", "auto", "coding"))
        rows.append((str(width), *(f"{share:.2f}" for share in shares)))
    header = ("W", "product path / plain", "planner's choice / plain", "rotation + coding / plain")
    return markdown_table(header, rows)
