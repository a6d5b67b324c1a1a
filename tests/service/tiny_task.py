"""A task small enough to index in a second: three passes of one block over five tokens.

Its model can be held at a gate, a folder of files as it runs in another process, so that tests decide when a call ends
and see how many there were.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loopsway.indexer import Checkpoint, Loop, Task

VOCABULARY, LENGTH, NUM_EXAMPLES, DIM = 7, 5, 48, 8


class Looped(nn.Module):
    """Embeds the tokens, applies one block again and again, and reads the last token out."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.block = nn.Sequential(nn.Linear(DIM, DIM), nn.LayerNorm(DIM), nn.Tanh(), nn.Linear(DIM, DIM))
        self.readout = nn.Linear(DIM, VOCABULARY)

    def forward(self, tokens: torch.Tensor, num_steps: int) -> torch.Tensor:
        injected = state = self.embedding(tokens)
        for _ in range(num_steps):
            state = state + self.block(state + injected)
        return self.readout(state[:, -1])


class TinyTask(Task):
    """Next-token prediction on random tokens.

    Args:
        learning_rate: of the first checkpoint; another one makes other sketches.
        gate: a folder. Each call of the model adds a byte to its file `calls`, makes `entered`, and ends when there is
            no `held`; the file `largest` has the largest batch that memory suffices for, and `broken` stands for a
            fault of the device in one call. Each time a checkpoint is loaded adds a byte to `loads`, and ends when
            there is no `loading_held`; it fails while there is `hidden`.
        freed_bytes: of memory that it leaves behind.
    """

    loop = Loop(body=["block"])

    def __init__(self, learning_rate: float = 0.1, gate: str | None = None, freed_bytes: int = 0) -> None:
        self._learning_rate = learning_rate
        self._kept = leave_freed(freed_bytes)
        draw = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(VOCABULARY, (NUM_EXAMPLES, LENGTH + 1), generator=draw).tolist()
        self._gate = None if gate is None else Path(gate)

    def checkpoints(self) -> Sequence[Checkpoint]:
        return [
            Checkpoint(name="early", learning_rate=self._learning_rate),
            Checkpoint(name="late", learning_rate=0.05),
        ]

    def model(self, checkpoint: Checkpoint) -> nn.Module:
        if self._gate is not None:
            _count(self._gate / "loads")
            _wait_while(self._gate / "loading_held")
            if (self._gate / "hidden").exists():
                raise OSError("[Errno 116] Stale file handle")
        torch.manual_seed(len(checkpoint.name))
        return Looped().eval()

    def examples(self) -> Sequence[Any]:
        return [{"tokens": tokens, "num_steps": 3} for tokens in self._tokens]

    def collate(self, examples: Sequence[Any]) -> Any:
        steps = {example["num_steps"] for example in examples}
        if len(steps) > 1:
            raise ValueError(f"the examples of one batch want {sorted(steps)} steps, expected one number")
        return {"tokens": torch.tensor([example["tokens"] for example in examples]), "num_steps": steps.pop()}

    def losses(self, model: nn.Module, batch: Any) -> torch.Tensor:
        tokens = batch["tokens"]
        if self._gate is not None:
            self._pass(self._gate, len(tokens))
        logits = model(tokens[:, :-1], batch["num_steps"])
        return nn.functional.cross_entropy(logits, tokens[:, -1], reduction="none")

    def _pass(self, gate: Path, batch: int) -> None:
        _count(gate / "calls")
        (gate / "entered").touch()
        _wait_while(gate / "held")
        broken, largest = gate / "broken", gate / "largest"
        if broken.exists():
            broken.unlink()
            raise torch.AcceleratorError("CUDA error: device-side assert triggered")
        if largest.exists() and batch > int(largest.read_text()):
            raise torch.OutOfMemoryError(f"no memory for {batch} examples")

    def example_from_json(self, obj: Any) -> Any:
        tokens = obj["tokens"]  # a TypeError or KeyError when the caller sends something else, as in many a task
        if len(tokens) != LENGTH + 1 or not all(isinstance(t, int) and 0 <= t < VOCABULARY for t in tokens):
            raise ValueError(f"tokens is {tokens}, expected {LENGTH + 1} whole numbers from 0 to {VOCABULARY - 1}")
        num_steps = obj.get("num_steps", 3)
        if num_steps == 13:
            raise RuntimeError("secret: /etc/weights")
        return {"tokens": tokens, "num_steps": num_steps}

    def example_id(self, row: int) -> str:
        return f"tiny-{row}"

    def metadata(self, row: int) -> dict[str, Any]:
        return {"row": row, "half": row / 2, "even": row % 2 == 0, "name": f"ä{row}", "none": None, "big": 2**60 + row}

    def describe(self, row: int) -> str:
        return " ".join(map(str, self._tokens[row]))


class AwareTask(TinyTask):
    """The same, trained by Adam: its second moments are as far apart as those of real trainings."""

    def second_moments(self, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(len(checkpoint.name))
        return {
            name: (4 * torch.randn(parameter.shape, generator=draw) - 8).exp()
            for name, parameter in self.model(checkpoint).named_parameters()
        }


def _wait_while(file: Path) -> None:
    while file.exists():
        time.sleep(0.002)


def leave_freed(size_bytes: int) -> list[bytearray]:
    """Frees so much memory between small blocks that live on, in which the C library keeps it; gives these."""
    blocks = [(bytearray(64 << 10), bytearray(1 << 10)) for _ in range(size_bytes >> 16)]
    return [small for _, small in blocks]


def _count(file: Path) -> None:
    with file.open("ab") as counted:
        counted.write(b".")
