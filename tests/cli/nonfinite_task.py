"""The tiny task with one example whose loss is not a number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loopsway.indexer import load_task

TinyTask: Any = type(load_task(f"{Path(__file__).parent.parent / 'service' / 'tiny_task.py'}:TinyTask"))


class NonFiniteTask(TinyTask):
    """Row 7 has no finite loss."""

    def losses(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        bad = torch.tensor(self._tokens[7])
        is_bad = (batch["tokens"] == bad).all(1)
        return super().losses(model, batch) / torch.where(is_bad, 0.0, 1.0)
