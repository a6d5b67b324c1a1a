"""Examples a second of the build's sketching, against a plain forward and backward of the same batches.

    python tests/benchmarks/bench_build.py [--run runs/parity] [--smoke]

A plain step computes every parameter's gradient of the summed losses. It is one part forward, one part the
activations' gradients and one part the weights' gradients. Sketching needs the first two, and multiplies each
example's weight gradient out instead of the third, so a plain step is the floor; adding the products to their buckets,
rotation and coding come on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measurement import markdown_table, parse_arguments

from loopsway.experiments.looped_gpt import GPTTask, Shape
from loopsway.experiments.texts import synthetic_texts
from loopsway.experiments.timing import median_seconds
from loopsway.indexer import ExampleSketcher, SketchConfig, Task, load_task
from loopsway.indexer.gradients.forms import Dense, Gradient, OuterProduct
from loopsway.indexer.sketches.capture import Capture
from loopsway.indexer.sketches.coding import code_examples

SHAPES = (Shape(dim=128), Shape(dim=256, num_bytes=128))
SMOKE_SHAPES = (Shape(dim=32, num_steps=2, num_bytes=16, batch=4),)
PARITY_TASK, PARITY_BATCH = "loopsway.tasks.parity:ParityTask", 32
WIDTHS, BITS = (8192, 65536), 1


class _Ignore:
    """A sink that drops the gradients: what remains is the forward and the activations' backward."""

    values = torch.zeros(0)

    def add(self, parameter: str, step: int, gradient: Gradient) -> None:
        pass


class _MultiplyOut:
    """A sink that multiplies each example's gradients out and drops them: what remains to add is the scatter."""

    values = torch.zeros(0)

    def add(self, parameter: str, step: int, gradient: Gradient) -> None:
        match gradient:
            case OuterProduct(left, right):
                torch.bmm(left.transpose(1, 2), right)
            case Dense(_):
                pass


@dataclass(frozen=True)
class Subject:
    """A task and one batch of its examples."""

    name: str
    task: Task
    examples: Sequence[Any]


def seconds_of_parts(subject: Subject, width: int, repeats: int) -> dict[str, float]:
    """Medians for one batch and one checkpoint."""
    task, config = _LastCheckpoint(subject.task), SketchConfig(width=width, bits=BITS)
    batch, model = task.collate(subject.examples), task.model(task.checkpoints()[0])
    sketcher = ExampleSketcher(task, config, batch_size=len(subject.examples))
    capture = Capture(model, task.loop)
    finished = sketcher.sketch(subject.examples).values

    def plain() -> None:
        model.zero_grad()
        task.losses(model, batch).sum().backward()

    calls: dict[str, Callable[[], Any]] = {
        "plain": plain,
        "activations": lambda: capture.run(task.losses, batch, lambda *_: _Ignore()),
        "products": lambda: capture.run(task.losses, batch, lambda *_: _MultiplyOut()),
        "sketch": lambda: sketcher.sketch(subject.examples),
        "coding": lambda: code_examples(finished, seed=config.seed, bits=BITS),
    }
    return median_seconds(calls, repeats)


class _LastCheckpoint(Task):
    """The same task with its last checkpoint alone: the others cost the same."""

    def __init__(self, task: Task) -> None:
        self._task, self.loop = task, task.loop
        self._last = task.checkpoints()[-1]
        self._model = task.model(self._last)

    def checkpoints(self) -> list[Any]:
        return [self._last]

    def model(self, checkpoint: Any) -> torch.nn.Module:
        return self._model

    def examples(self) -> Sequence[Any]:
        return self._task.examples()

    def collate(self, examples: Sequence[Any]) -> Any:
        return self._task.collate(examples)

    def losses(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        return self._task.losses(model, batch)


def row(subject: Subject, width: int, repeats: int) -> tuple[str, ...]:
    """Each part as a multiple of the plain step."""
    seconds, count = seconds_of_parts(subject, width, repeats), len(subject.examples)
    plain, whole = seconds["plain"], seconds["sketch"] + seconds["coding"]
    parts = (
        seconds["activations"],
        seconds["products"] - seconds["activations"],
        seconds["sketch"] - seconds["products"],
        seconds["coding"],
        whole,
    )
    rates = (f"{count / plain:.0f}", f"{count / whole:.0f}")
    return (subject.name, str(width), *rates, *(f"{part / plain:.2f}" for part in parts))


def subjects(run: str | None, *, smoke: bool) -> list[Subject]:
    found = []
    for shape in SMOKE_SHAPES if smoke else SHAPES:
        texts = synthetic_texts(shape.batch)
        found.append(Subject(f"{shape}, batch {shape.batch}", GPTTask(shape, texts), texts))
    if run is not None:
        task = load_task(PARITY_TASK, {"run": run})
        examples = task.examples()
        batch = [examples[row] for row in range(min(PARITY_BATCH, len(examples)))]
        found.append(Subject(f"parity, batch {len(batch)}", task, batch))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", help="folder of a trained parity model (loopsway train parity)")
    arguments = parse_arguments(parser)
    header = ("model", "W", "plain examples/s", "build examples/s", "forward + activations", "products", "scatter",
              "rotation + coding", "build / plain")  # fmt: skip
    rows = [
        row(subject, width, arguments.repeats)
        for subject in subjects(arguments.run, smoke=arguments.smoke)
        for width in (WIDTHS[:1] if arguments.smoke else WIDTHS)
    ]
    print(
        f"One checkpoint, {BITS} bit, {arguments.threads} thread(s). Parts are multiples of a plain step, the floor is "
        "1: 2/3 for forward + activations, 1/3 for products.\n"
    )
    print(markdown_table(header, rows))


if __name__ == "__main__":
    main()
