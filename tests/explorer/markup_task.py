"""The small task with training text that would run, look or break out, were it ever taken for markup."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loopsway.indexer import Loop, load_task

# By its file: the model's process has no other way to it.
TinyTask: Any = type(load_task(f"{Path(__file__).parents[1] / 'service' / 'tiny_task.py'}:TinyTask"))


class MarkupTask(TinyTask):
    """Texts and metadata full of markup, quotes and line breaks."""

    def describe(self, row: int) -> str:
        return f'<img src=x onerror="document.title=1"> <b>row {row}</b> &amp; "quoted", {super().describe(row)}'

    def metadata(self, row: int) -> dict[str, Any]:
        return {"row": row, "source": f"<script>document.title={row}</script>", "none": None}


class LongTask(MarkupTask):
    """Thirty steps, and what is outside of the loop as well."""

    loop = Loop(body=["block"], outside=True)

    def examples(self) -> Sequence[Any]:
        return [example | {"num_steps": 30} for example in super().examples()]

    def example_from_json(self, obj: Any) -> Any:
        return super().example_from_json({"num_steps": 30} | obj)
