"""bergson (PyPI: bergson) as a method. It asks for packages that don't go with ours, so another Python runs it.

`bergson_program.py` is what that Python runs; the two exchange JSON, safetensors and npz, and nothing that holds code.
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
from .training import TrainedTask

PROGRAM = Path(__file__).with_name("bergson_program.py")
FILE = "bergson.npz"
WITHOUT_BERGSON = "bergson is left out: --bergson-python names a Python that has it"


@dataclass(frozen=True, kw_only=True)
class Bergson:
    """Asks bergson.

    Attributes:
        python: of an environment with bergson, torch, numpy and safetensors.
        subject: its name in SUBJECTS.
        tiny: whether it was made so.

    Raises:
        ValueError: this Python has no bergson.
    """

    python: Path
    subject: str
    tiny: bool = False

    def __post_init__(self) -> None:
        look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('bergson') is None)"
        if subprocess.run([str(self.python), "-c", look], check=False).returncode != 0:
            raise ValueError(f"{self.python} has no bergson: install it there, or name another Python")

    def predict(self, task: TrainedTask, queries: Sequence[Any], folder: Path) -> Predictions:
        """What it says of a training, and of examples on themselves.

        Args:
            task: the training.
            queries: of the subject.
            folder: takes what it said, which is used again.

        Raises:
            RuntimeError: it failed; the message ends with its own.
        """
        if not (folder / FILE).exists():
            self._ask(task, queries, folder)
        return Predictions.read(folder / FILE)

    def _ask(self, task: TrainedTask, queries: Sequence[Any], folder: Path) -> None:
        asked, batches = folder / "bergson.json", folder / "bergson.safetensors"
        save_file(
            {**_parts("rows", task.collate(task.examples())), **_parts("queries", task.collate(queries))}, batches
        )
        document = {
            "subject": self.subject,
            "tiny": self.tiny,
            "body": list(task.loop.body),
            "checkpoints": [asdict(checkpoint) for checkpoint in task.checkpoints()],
            "batches": str(batches.absolute()),
            "answer": str((folder / FILE).absolute()),
            "roots": [str(Path(root).parent) for root in loopsway.__path__],
        }
        asked.write_text(json.dumps(document), encoding="utf-8")
        command = [
            str(self.python),
            "-P",
            str(PROGRAM),
            str(asked),
        ]  # -P: the files beside it are no modules of its own
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise RuntimeError(f"bergson, run by {self.python}, ended with {done.returncode}: {said}")


def _parts(name: str, batch: Tensor | tuple[Tensor, ...]) -> dict[str, Tensor]:
    """A batch is a tensor or a tuple of them."""
    parts = batch if isinstance(batch, tuple) else (batch,)
    return {f"{name}.{number}": part.contiguous() for number, part in enumerate(parts)}
