"""Trains a subject on some of its rows; a run with checkpoints is a task that an index can be built of.

The same seed gives the same weights and the same batches, whatever is left out: a batch is then without the rows that
are left out. So two trainings differ by their data alone, and not by an order that was drawn anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loopsway.indexer import Checkpoint, Loop, Task
from loopsway.indexer.sketches.features import to_device
from loopsway.indexer.store.files import write_whole
from loopsway.tasks.threads import one_thread

from .subject import Course, Subject

BETAS, CLIP_NORM = (0.9, 0.98), 1.0
RECORD = "run.json"

Keep = Callable[[int, nn.Module, torch.optim.AdamW], None]


def train(
    subject: Subject, rows: Sequence[Any], kept: np.ndarray, seed: int, keep: Keep | None = None, device: str = "cpu"
) -> nn.Module:
    """A model trained on the kept rows, on the CPU again.

    Args:
        subject: whose model and course.
        rows: all N training examples.
        kept: bool [N].
        seed: of the weights and the batches.
        keep: called with the number of each checkpoint, the model and the optimizer.
        device: a torch device, to train on.
    """
    course = subject.course
    kept_rows = torch.from_numpy(np.asarray(kept, bool))
    with torch.random.fork_rng(devices=[]), one_thread():
        torch.manual_seed(seed)
        model = subject.new_model().to(device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=course.learning_rate, weight_decay=course.weight_decay, betas=BETAS, fused=True
        )
        wanted = course.checkpoint_steps()
        for step, batch in enumerate(drawn_batches(course, len(rows), seed)):
            if keep is not None and step in wanted:
                keep(wanted.index(step), model, optimizer)
            batch = batch[kept_rows[batch]].tolist()
            for group in optimizer.param_groups:
                group["lr"] = course.learning_rate_at(step)
            if batch:
                optimizer.zero_grad()
                examples = to_device(subject.collate([rows[row] for row in batch]), torch.device(device))
                subject.losses(model, examples).mean().backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
                optimizer.step()
    return model.cpu()


def drawn_batches(course: Course, num_rows: int, seed: int) -> Iterator[Tensor]:
    """The rows of each step's batch, before any are left out: int64 [batch_size], epoch after epoch."""
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    for _ in range(course.num_steps):
        while len(order) < course.batch_size:
            order = torch.cat([order, torch.randperm(num_rows, generator=generator)])
        yield order[: course.batch_size]
        order = order[course.batch_size :]


@torch.no_grad()
def query_losses(subject: Subject, model: nn.Module) -> np.ndarray:
    """[Q] float32."""
    with one_thread():
        return subject.losses(model, subject.collate(subject.queries)).numpy()


def train_with_checkpoints(
    subject: Subject, rows: Sequence[Any], seed: int, folder: Path, device: str = "cpu"
) -> TrainedTask:
    """Trains on all rows; a training that the folder holds already is used again.

    Raises:
        ValueError: it is a training of another subject.
    """
    facts, task = json.loads(json.dumps(subject.facts())), TrainedTask(subject, rows, folder)
    if (folder / RECORD).exists():
        if (kept := task.record().get("subject")) != facts:
            raise ValueError(f"{folder} holds a training of {kept}, asked for is {facts}: choose another folder")
        return task
    folder.mkdir(parents=True, exist_ok=True)

    def keep(number: int, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        step = subject.course.checkpoint_steps()[number]
        parameters = dict(model.named_parameters())
        moments = {name: _second_moment(optimizer, each, step) for name, each in parameters.items()}
        save_file({name: each.detach().clone() for name, each in parameters.items()}, _weights(folder, number))
        save_file(moments, _moments(folder, number))

    model = train(subject, rows, np.ones(len(rows), bool), seed, keep, device)
    record = {"subject": facts, "query_losses": query_losses(subject, model).tolist()}
    write_whole(folder / RECORD, json.dumps(record).encode())
    return task


class TrainedTask(Task):
    """A subject's finished training, for the indexer.

    Args:
        subject: whose.
        rows: that it was trained on.
        folder: of its checkpoints.
        outside: whether to attribute to the whole model, not to the loop's body alone.
    """

    def __init__(self, subject: Subject, rows: Sequence[Any], folder: Path, *, outside: bool = False) -> None:
        self._subject, self._rows, self._folder = subject, rows, folder
        self.loop = Loop(body=subject.body, outside=outside)

    def whole_model(self) -> TrainedTask:
        return TrainedTask(self._subject, self._rows, self._folder, outside=True)

    def record(self) -> dict[str, Any]:
        """Of the training: "subject", its facts, and "query_losses" after the last step."""
        return json.loads((self._folder / RECORD).read_text(encoding="utf-8"))

    def checkpoints(self) -> list[Checkpoint]:
        course = self._subject.course
        return [
            Checkpoint(name=str(step), learning_rate=course.learning_rate_at(step), path=_weights(self._folder, number))
            for number, step in enumerate(course.checkpoint_steps())
        ]

    def model(self, checkpoint: Checkpoint) -> nn.Module:
        assert checkpoint.path is not None
        model = self._subject.new_model()
        model.load_state_dict(load_file(checkpoint.path))
        return model.eval()

    @property
    def course(self) -> Course:
        return self._subject.course

    def second_moments(self, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
        return load_file(_moments(self._folder, self._subject.course.checkpoint_steps().index(int(checkpoint.name))))

    def examples(self) -> Sequence[Any]:
        return self._rows

    def collate(self, examples: Sequence[Any]) -> Any:
        return self._subject.collate(examples)

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return self._subject.losses(model, batch)


def _second_moment(optimizer: torch.optim.AdamW, parameter: nn.Parameter, step: int) -> Tensor:
    """Corrected for its beginning at zero, as Adam itself does before it divides."""
    moment = optimizer.state[parameter].get("exp_avg_sq") if step else None
    return torch.ones_like(parameter) if moment is None else moment / (1 - BETAS[1] ** step)


def _weights(folder: Path, number: int) -> str:
    return str(folder / f"checkpoint-{number}.safetensors")


def _moments(folder: Path, number: int) -> str:
    return str(folder / f"moments-{number}.safetensors")
