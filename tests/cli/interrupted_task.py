"""A task whose build is interrupted once, as by Ctrl-C, after some of its batches."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from loopsway.indexer import load_task

TinyTask: Any = type(load_task(f"{Path(__file__).parent.parent / 'service' / 'tiny_task.py'}:TinyTask"))


class InterruptedTask(TinyTask):
    """The tiny task; `marker` is written when the interruption has happened."""

    def __init__(self, marker: str) -> None:
        super().__init__()
        self._marker, self._num_calls = Path(marker), 0

    def losses(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        self._num_calls += 1
        if self._num_calls == 6 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGINT)
        return super().losses(model, batch)
