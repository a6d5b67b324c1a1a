"""The tiny task, all of it or its first half."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopsway.indexer import load_task

TinyTask: Any = type(load_task(f"{Path(__file__).parent.parent / 'service' / 'tiny_task.py'}:TinyTask"))


class HalfTask(TinyTask):
    """`half=0`: the first half alone."""

    def __init__(self, half: int | None = None) -> None:
        super().__init__()
        self._half = half

    def examples(self) -> Sequence[Any]:
        examples = super().examples()
        return examples if self._half is None else examples[: len(examples) // 2]
