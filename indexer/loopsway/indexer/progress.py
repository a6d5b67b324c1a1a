"""Progress of a build on the terminal: what is being done, examples a second, time left."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s")


class BuildProgress:
    """A bar for each stage, on standard error.

    Args:
        shown: False draws nothing.
    """

    def __init__(self, *, shown: bool) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=Console(stderr=True),
            disable=not shown,
            speed_estimate_period=60,
        )
        self._current = None

    def __enter__(self) -> BuildProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, what: str, total: int, *, done: int = 0) -> None:
        """Starts a stage's bar; `done` of `total` were finished before, and don't count as speed."""
        self._current = self._bars.add_task(what, total=total, completed=done)

    def describe(self, what: str) -> None:
        """Says more of what the current stage does."""
        assert self._current is not None
        self._bars.update(self._current, description=what)

    def announce_stop(self) -> None:
        """Says that a signal was heard."""
        self._bars.console.print("stopping after this block; once more to stop at once and lose the block")

    def advance(self, count: int = 1) -> None:
        assert self._current is not None
        self._bars.advance(self._current, count)
