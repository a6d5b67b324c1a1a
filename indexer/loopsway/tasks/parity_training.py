"""Trains the parity task's looped transformer and records the run: its checkpoints and `training.json`.

Strings come shortest first: the next length joins once the model answers the longest so far, and each batch is half of
that length and half of shorter ones. Every string takes the same number of loops from the first batch to the last, and
checkpoints are written only from where the longest strings join: a step on any example, at any checkpoint, is one that
training might have taken there, which is what TracIn assumes. Knows nothing of attribution.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from .parity_model import ParityTransformer
from .parity_strings import MIN_LENGTH, encode, held_out_strings, labels, training_strings
from .saved_run import CheckpointWriter, SavedRun
from .threads import one_thread

__all__ = ["Recipe", "TrainReport", "TrainingFailedError", "accuracy", "is_trained", "train"]

MEMORY = 0.8  # share of the running accuracy that a batch leaves as it was
CHECK_EVERY = 25  # steps between two looks at all training strings


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; the defaults are what was found to work on two cores, whatever the seed.

    Attributes:
        width: of the model's residual stream.
        num_heads: of its attention.
        num_loops: how often the block is applied, to strings of every length.
        max_length: of the strings; at least 6: no shorter one is held out.
        batch_size: strings a step.
        learning_rate: of AdamW, reached after `warmup_steps`.
        weight_decay: of AdamW.
        warmup_steps: steps over which the learning rate rises.
        cooldown_steps: steps over which it falls to a twentieth, once the longest strings are learned.
        advance_accuracy: running accuracy at the current length that lets the next one join.
        cooldown_accuracy: accuracy on the training strings of every length that begins the cooldown.
        target_accuracy: accuracy on the held-out strings that a run must reach.
        max_steps: steps after which a seed is given up.
    """

    width: int = 48
    num_heads: int = 4
    num_loops: int = 11
    max_length: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 30
    cooldown_steps: int = 150
    advance_accuracy: float = 0.95
    cooldown_accuracy: float = 0.99
    target_accuracy: float = 0.99
    max_steps: int = 2500

    def __post_init__(self) -> None:
        if self.max_length < 6:
            raise ValueError(f"max_length is {self.max_length}, expected 6 or more: no shorter string is held out")

    def model(self) -> dict[str, int]:
        """The arguments that rebuild the model."""
        names = ("width", "num_heads", "num_loops", "max_length")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class TrainReport(SavedRun):
    """What a finished training reached.

    Attributes:
        model: the arguments that rebuild the model.
        seed: the seed that reached it.
        seconds: of wall time, with any seed that was given up.
        steps: optimizer steps of that seed.
        training_accuracy: by string length, on the strings it was trained on.
        held_out_accuracy: by string length, on strings it never saw.
    """

    model: dict[str, int]
    steps: int
    training_accuracy: dict[int, float]
    held_out_accuracy: dict[int, float]

    @property
    def overall_held_out_accuracy(self) -> float:
        """On all held-out strings taken together, however long."""
        counts = {length: len(held_out_strings(length)) for length in self.held_out_accuracy}
        right = sum(share * counts[length] for length, share in self.held_out_accuracy.items())
        return right / sum(counts.values())

    @classmethod
    def _from_json(cls, record: dict[str, Any]) -> dict[str, Any]:
        for accuracies in ("training_accuracy", "held_out_accuracy"):
            record[accuracies] = {int(length): share for length, share in record[accuracies].items()}
        return record


def is_trained(run: str | Path) -> bool:
    """Whether the folder holds a finished training, complete with its checkpoints."""
    try:
        TrainReport.read(run)
    except (OSError, ValueError):
        return False
    return True


class TrainingFailedError(RuntimeError):
    """No seed that was tried reached the accuracy that the recipe asks for."""


def train(
    run: str | Path, *, seed: int = 0, progress: bool = True, recipe: Recipe | None = None, attempts: int = 3
) -> TrainReport:
    """Trains on the CPU and leaves a finished run in the folder; what an earlier training left there is replaced.

    The same seed gives the same checkpoints on the same machine. Torch's global random state is left as it was.

    Args:
        run: the run's folder.
        seed: of the weights and of the batches.
        progress: whether to show it in the terminal.
        recipe: how to train; None for the one that works.
        attempts: seeds to try, counting up from `seed`; the report names the one that reached the accuracy.

    Raises:
        TrainingFailedError: none of the seeds did; the folder then holds no finished run.
    """
    recipe, start, reached = recipe or Recipe(), time.perf_counter(), []
    with one_thread(), _display(recipe, progress) as show:
        for candidate in range(seed, seed + attempts):
            training = _Training(recipe, candidate, CheckpointWriter(run))
            while training.wants_another_step():
                training.take_step()
                show(training)
            training.save()
            report = training.report(str(run), time.perf_counter() - start)
            accuracy = report.overall_held_out_accuracy
            if training.is_finished() and accuracy >= recipe.target_accuracy:
                report.write()
                return report
            reached.append(f"{accuracy:.1%} with seed {candidate}")
    raise TrainingFailedError(
        f"training in {run} reached, on held-out strings, {', '.join(reached)}; expected {recipe.target_accuracy:.0%} "
        f"within max_steps={recipe.max_steps}; try another seed or allow more steps"
    )


class _Training:
    """One seed's way from new weights to the last checkpoint."""

    def __init__(self, recipe: Recipe, seed: int, writer: CheckpointWriter) -> None:
        self.recipe, self.seed, self._writer = recipe, seed, writer
        self.step, self.length, self.accuracy = 0, MIN_LENGTH, 0.0  # accuracy: running, at the current length
        self._learned_at: int | None = None  # the step at which the longest strings were learned
        self._cooling_since: int | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._model = ParityTransformer(**recipe.model())
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            betas=(0.9, 0.98),
            fused=True,
        )
        self._batches = _Batches(recipe, torch.Generator().manual_seed(seed))

    def wants_another_step(self) -> bool:
        return self.step < self.recipe.max_steps and not self.is_finished()

    def is_finished(self) -> bool:
        return self._cooling_since is not None and self.step >= self._cooling_since + self.recipe.cooldown_steps

    def take_step(self) -> None:
        tokens, parities, num_longest = self._batches.draw(self.length)
        for group in self._optimizer.param_groups:
            group["lr"] = self._learning_rate()
        logits = self._model(tokens)
        self._optimizer.zero_grad()
        functional.cross_entropy(logits, parities).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self.step += 1
        right = logits.argmax(1) == parities
        self.accuracy += (1 - MEMORY) * (right[:num_longest].float().mean().item() - self.accuracy)
        self._follow_curriculum()

    def save(self) -> None:
        self._writer.write(self._model, step=self.step, learning_rate=self._optimizer.param_groups[0]["lr"])

    def report(self, run: str, seconds: float) -> TrainReport:
        return TrainReport(
            run=run,
            model=self.recipe.model(),
            seed=self.seed,
            seconds=round(seconds, 1),
            steps=self.step,
            training_accuracy=self._accuracies(training_strings),
            held_out_accuracy=self._accuracies(held_out_strings),
            saved=tuple(self._writer.saved),
        )

    def _follow_curriculum(self) -> None:
        if self._learned_at is None:
            if self.accuracy >= self.recipe.advance_accuracy:
                self._leave_length()
        elif self._cooling_since is None and (self.step - self._learned_at) % CHECK_EVERY == 0:
            accuracies = self._accuracies(training_strings)
            if min(accuracies.values()) >= self.recipe.cooldown_accuracy:
                self._cooling_since = self.step
                self.save()

    def _leave_length(self) -> None:
        if self.length >= self.recipe.max_length - 1:
            self.save()
        if self.length == self.recipe.max_length:
            self._learned_at = self.step
        else:
            self.length, self.accuracy = self.length + 1, 0.0

    def _learning_rate(self) -> float:
        factor = min(1.0, (self.step + 1) / self.recipe.warmup_steps)
        if self._cooling_since is not None:
            factor = max(0.05, 1 - (self.step - self._cooling_since) / self.recipe.cooldown_steps)
        return self.recipe.learning_rate * factor

    def _accuracies(self, strings_of: Callable[[int], list[str]]) -> dict[int, float]:
        strings = {length: strings_of(length) for length in range(MIN_LENGTH, self.recipe.max_length + 1)}
        return {length: accuracy(self._model, some) for length, some in strings.items() if some}


class _Batches:
    """Draws batches of training strings, half of the current length and half of the shorter ones.

    Strings are drawn in proportion to one over the square root of how many share their length and number of ones: else
    those of nearly all zeros or ones are so rare that the model answers all others long before it has learned them.
    """

    def __init__(self, recipe: Recipe, generator: torch.Generator) -> None:
        self._size, self._generator = recipe.batch_size, generator
        strings = {length: training_strings(length) for length in range(MIN_LENGTH, recipe.max_length + 1)}
        padding_to = "0" * recipe.max_length  # a string as long as any, so that all lengths have one shape
        self._tokens = {length: encode([*some, padding_to])[:-1] for length, some in strings.items()}
        self._labels = {length: labels(some) for length, some in strings.items()}
        self._weights = {length: _weights(some) for length, some in strings.items()}

    def draw(self, length: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Tokens [B, 1 + length], labels [B], and how many strings, the first of them, are of this very length."""
        num_longest = self._size if length == MIN_LENGTH else self._size // 2
        shorter = torch.randint(MIN_LENGTH, max(length, MIN_LENGTH + 1), [self._size], generator=self._generator)
        counts = torch.bincount(shorter[num_longest:], minlength=length + 1)
        counts[length] = num_longest
        tokens, parities = [], []
        for n in range(length, MIN_LENGTH - 1, -1):
            if count := int(counts[n]):
                rows = torch.multinomial(self._weights[n], count, replacement=True, generator=self._generator)
                tokens.append(self._tokens[n][rows, : 1 + length])
                parities.append(self._labels[n][rows])
        return torch.cat(tokens), torch.cat(parities), num_longest


def _weights(strings: list[str]) -> torch.Tensor:
    ones = torch.tensor([bits.count("1") for bits in strings])
    return torch.bincount(ones)[ones].float().rsqrt()


@torch.no_grad()
def accuracy(model: ParityTransformer, strings: list[str], num_loops: int | None = None) -> float:
    """The share of the strings whose parity the model tells, with as many loops as it was trained with or others."""
    return (model(encode(strings), num_loops).argmax(1) == labels(strings)).float().mean().item()


@contextmanager
def _display(recipe: Recipe, progress: bool) -> Iterator[Callable[[_Training], None]]:
    """Gives what shows a training's state: a bar of the lengths learned, or nothing."""
    if not progress:
        yield lambda training: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task("training parity", total=recipe.max_length, state="")

        def show(training: _Training) -> None:
            state = (
                f"seed {training.seed}, step {training.step}, length {training.length}: {training.accuracy:.0%} right"
            )
            done = recipe.max_length if training.is_finished() else training.length - 1
            bar.update(task, completed=done, state=state)

        yield show
