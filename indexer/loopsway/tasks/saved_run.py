"""A training on disk: safetensors checkpoints, and `training.json`, which is written last and makes the run finished.

Knows how a run is written and read, each file whole or not at all, and nothing of how a model is trained. What else a
task records, a subclass of `SavedRun` adds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save

from loopsway.indexer.config import Checkpoint
from loopsway.indexer.store.files import write_whole

FORMAT = 1
RECORD = "training.json"


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    """One checkpoint of a run.

    Attributes:
        name: unique in its run.
        step: optimizer steps taken before it was written.
        learning_rate: of the last of them.
        file: its file's name in the run's folder.
    """

    name: str
    step: int
    learning_rate: float
    file: str


@dataclass(frozen=True, kw_only=True)
class SavedRun:
    """A finished training.

    Attributes:
        run: the run's folder.
        seed: of all that was drawn.
        seconds: of wall time.
        saved: its checkpoints, in the order of training.
    """

    run: str
    seed: int
    seconds: float
    saved: tuple[SavedCheckpoint, ...]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints as a Task names them."""
        folder = Path(self.run)
        return tuple(
            Checkpoint(name=saved.name, learning_rate=saved.learning_rate, path=str(folder / saved.file))
            for saved in self.saved
        )

    def write(self) -> None:
        """Makes the run finished."""
        record = {"format": FORMAT, **asdict(self)}
        del record["run"]  # the folder may be moved
        write_whole(Path(self.run) / RECORD, (json.dumps(record, indent=2) + "\n").encode())

    @classmethod
    def read(cls, run: str | Path) -> Self:
        """The record of a finished run.

        Raises:
            FileNotFoundError: the run is not finished, or a checkpoint's file is gone.
            ValueError: the record is damaged or of another format.
        """
        path = Path(run) / RECORD
        if not path.is_file():
            raise FileNotFoundError(f"{run} holds no finished training: {RECORD} is missing")
        try:
            record = json.loads(path.read_bytes())
            if record.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}, the one this version of Loopsway reads")
            saved = tuple(SavedCheckpoint(**checkpoint) for checkpoint in record.pop("saved"))
            report = cls(run=str(run), saved=saved, **cls._from_json(record))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
        for checkpoint in report.saved:
            if not (Path(run) / checkpoint.file).is_file():
                raise FileNotFoundError(f"{run} holds no finished training: {checkpoint.file} is missing")
        return report

    @classmethod
    def _from_json(cls, record: dict[str, Any]) -> dict[str, Any]:
        """The fields that a subclass adds, as it has them."""
        return record


class CheckpointWriter:
    """Writes a training's checkpoints into its run's folder, which it makes unfinished first."""

    def __init__(self, run: str | Path) -> None:
        self._folder = Path(run)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / RECORD).unlink(missing_ok=True)  # first: it must never stand beside other weights
        for old in self._folder.glob("checkpoint-*.safetensors"):
            old.unlink()
        self._saved: list[SavedCheckpoint] = []

    @property
    def saved(self) -> Sequence[SavedCheckpoint]:
        return self._saved

    def write(self, model: torch.nn.Module, *, step: int, learning_rate: float) -> None:
        name = f"checkpoint-{len(self._saved) + 1:04d}"
        checkpoint = SavedCheckpoint(name=name, step=step, learning_rate=learning_rate, file=f"{name}.safetensors")
        write_whole(self._folder / checkpoint.file, save(model.state_dict()))
        self._saved.append(checkpoint)
