"""bergson (PyPI: bergson) as a method. It asks for packages that don't go with ours, so another Python runs it.

`bergson_program.py` and `magic_program.py` are what that Python runs; JSON, safetensors and npz go to and fro, and
nothing that holds code.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

import loopsway

from .predictions import Predictions
from .training import BETAS, CLIP_NORM, TrainedTask, drawn_batches

GRADIENTS, MAGIC = "bergson", "magic"  # the programs, and the files of their answers
WITHOUT_BERGSON = "bergson is left out: --bergson-python names a Python that has it"


@dataclass(frozen=True, kw_only=True)
class Bergson:
    """Asks bergson.

    Attributes:
        python: of an environment with bergson, torch, numpy and safetensors.
        subject: its name in SUBJECTS.
        tiny: whether it was made so.
        magic: whether it also differentiates through the training, minutes for each.

    Raises:
        ValueError: this Python has no bergson.
    """

    python: Path
    subject: str
    tiny: bool = False
    magic: bool = False

    def __post_init__(self) -> None:
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('bergson') is None)"
        if subprocess.run([str(self.python), "-c", look], check=False).returncode != 0:
            raise ValueError(f"{self.python} has no bergson: install it there, or name another Python")

    def predict(self, task: TrainedTask, queries: Sequence[Any], folder: Path, seed: int) -> Predictions:
        """What it says of a training, and of examples on themselves.

        Args:
            task: the training.
            queries: of the subject.
            folder: takes what it said, which is used again.
            seed: of the training.

        Raises:
            RuntimeError: it failed; the message ends with its own.
        """
        found = Predictions()
        for program in (GRADIENTS, MAGIC) if self.magic else (GRADIENTS,):
            answer = folder / f"{program}.npz"
            if not answer.exists():
                self._ask(program, self._request(task, queries, folder, seed, answer))
            found.update(Predictions.read(answer))
        return found

    def _request(self, task: TrainedTask, queries: Sequence[Any], folder: Path, seed: int, answer: Path) -> Path:
        """Writes what a program is told."""
        batches, rows, course = folder / "bergson.safetensors", task.examples(), task.course
        save_file({**_parts("rows", task.collate(rows)), **_parts("queries", task.collate(queries))}, batches)
        document = {
            "subject": self.subject,
            "tiny": self.tiny,
            "body": list(task.loop.body),
            "checkpoints": [asdict(checkpoint) for checkpoint in task.checkpoints()],
            "training": {
                "seed": seed,
                "batches": [batch.tolist() for batch in drawn_batches(course, len(rows), seed)],
                "learning_rates": [course.learning_rate_at(step) for step in range(course.num_steps)],
                "betas": BETAS,
                "weight_decay": course.weight_decay,
                "clip_norm": CLIP_NORM,
            },
            "batches": str(batches.absolute()),
            "answer": str(answer.absolute()),
            "roots": [str(Path(root).parent) for root in loopsway.__path__],
        }
        file = answer.with_suffix(".json")
        file.write_text(json.dumps(document), encoding="utf-8")
        return file

    def _ask(self, program: str, request: Path) -> None:
        file = Path(__file__).with_name(f"{program}_program.py")
        command = [str(self.python), "-P", str(file), str(request)]  # -P: what lies beside it is no module of its own
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"bergson, run by {self.python}, ended with {done.returncode}: {said}")


def _parts(name: str, batch: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """A batch is a tensor or a tuple of them."""
    parts = batch if isinstance(batch, tuple) else (batch,)
    return {f"{name}.{number}": part.contiguous() for number, part in enumerate(parts)}
