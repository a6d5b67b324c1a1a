"""The small task with training text that would run, look or break out, were it ever taken for markup."""

from __future__ import annotations

from typing import Any

from service.tiny_task import TinyTask


class MarkupTask(TinyTask):
    """Texts and metadata full of markup, quotes and line breaks."""

    def describe(self, row: int) -> str:
        return f'<img src=x onerror="document.title=1"> <b>row {row}</b> &amp; "quoted", {super().describe(row)}'

    def metadata(self, row: int) -> dict[str, Any]:
        return {"row": row, "source": f"<script>document.title={row}</script>", "none": None}
