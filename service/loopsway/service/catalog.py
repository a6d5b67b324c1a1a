"""The indices of a server by name, each in the generation that answers now; looked at for newer ones."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from loopsway.indexer import StorageError

from .checks import check_aliases
from .engine import Engine
from .errors import PreconditionError, UnavailableError
from .served import RefusedGeneration, ServedIndex
from .settings import Settings, TokenSettings
from .worker import ModelWorker

_log = logging.getLogger(__name__)


class Catalog(Mapping[str, Engine]):
    """Opens the indices; `start` makes them ready, `stop` closes them. Its keys are the indices' names.

    Attributes:
        worker: of all indices' models.

    Raises:
        LoadError, FileNotFoundError, ValueError: as `load_engine`; or two indices have one name.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._served = settings, dict[str, ServedIndex]()
        if not settings.indices:
            raise ValueError("no indices to serve; give at least one")
        for asked in settings.indices:
            served = ServedIndex(asked, settings)
            name = served.engine.name
            if name in self._served:
                raise ValueError(f"two indices are named {name}: give one another name, as NAME=PATH")
            self._served[name] = served
        self._aliases: dict[str, str] = {}
        self.alias(settings.aliases, settings.tokens)
        self.worker = ModelWorker(settings)
        self._is_asked = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def __getitem__(self, name: str) -> Engine:
        return self._served[name].engine

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    @property
    def reloads(self) -> Counter[tuple[str, str]]:
        """New generations, by the index and what became of them: "done", "refused" or "failed"."""
        counts = {
            (name, each): count for name, served in self._served.items() for each, count in served.outcomes.items()
        }
        return Counter(counts)

    def refused(self, name: str) -> RefusedGeneration | None:
        """The newer generation of an index that is not answered from; None: there is none."""
        return self._served[name].refused

    def index_name(self, name: str) -> str:
        """The name of the index that this alias stands for now; what is no alias stands for itself."""
        return self._aliases.get(name, name)

    def aliases_of(self, name: str) -> list[str]:
        """The aliases that stand for an index now, ascending."""
        return sorted(alias for alias, of in self._aliases.items() if of == name)

    def alias(self, aliases: Mapping[str, str], tokens: Iterable[TokenSettings]) -> None:
        """Takes all of these aliases at once, in place of those before.

        Args:
            aliases: names of indices, by alias.
            tokens: that are known beside them.

        Raises:
            SettingsError: one is an index's own name, of an index that is not served, or in a token's scope; those
                before stay.
        """
        check_aliases(aliases, self._served, tokens)
        self._aliases = dict(aliases)

    async def start(self, on_ready: Callable[[str], Awaitable[None]]) -> None:
        """Warms every index up, and from then on looks for new generations."""
        for name, served in self._served.items():
            await served.start(self.worker)
            await on_ready(name)
        self._begin(self._watch())

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for served in self._served.values():
            await asyncio.to_thread(served.engine.close)
        await self.worker.stop()

    def look(self) -> None:
        """Looks for new generations now, and does not wait for the next time."""
        self._is_asked.set()

    async def reload(self, name: str) -> Engine:
        """Looks for a new generation of one index now, also for one that was refused; goes on if it is cancelled.

        Returns:
            What answers from now on.

        Raises:
            PreconditionError: the new generation is refused.
            UnavailableError: it can't be looked at, or opened, just now.
        """
        served = self._served[name]
        try:
            await asyncio.shield(self._begin(served.look(self.worker, again=True)))
        except StorageError as error:
            served.note_failure()
            _log.error("index %s could not be looked at: %s", name, error)
            raise UnavailableError(
                f"the storage of index {name} does not answer", retry_after_s=self._settings.retry_after_s
            ) from error
        if (refused := served.refused) is None:
            return served.engine
        text = (
            f"generation {refused.generation or 'unknown'} of index {name} is refused, generation "
            f"{served.engine.index.generation} goes on: {refused.reason}"
        )
        if refused.is_final:
            raise PreconditionError(text, field="index")
        raise UnavailableError(text, retry_after_s=self._settings.retry_after_s)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs it until it ends or the catalog stops."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _watch(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_asked.wait(), self._settings.reload_poll_s or None)
            self._is_asked.clear()
            for name, served in self._served.items():
                try:
                    await served.look(self.worker)
                except Exception:
                    served.note_failure()
                    _log.exception("index %s could not be looked at", name)
