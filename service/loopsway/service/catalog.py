"""The indices of a server by name, each in the generation that answers now.

A new generation is opened and warmed up beside the old one and then takes its place. Requests that run meanwhile finish
on the old one, which is closed with the last of them. One that can't be opened is refused, and the old one stays.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from loopsway.indexer import StorageError
from loopsway.indexer.store.addresses import open_folder
from loopsway.indexer.store.manifest import MANIFEST

from .checks import check_aliases
from .engine import Engine
from .errors import UnavailableError
from .loading import load_engine
from .settings import IndexSettings, Settings
from .worker import ModelWorker

_log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class _Served:
    """One index.

    Attributes:
        engine: of the generation that answers now.
        manifest: digest of the manifest that was last looked at, served or refused; "" to look again.
    """

    asked: IndexSettings
    engine: Engine
    manifest: str


class Catalog(Mapping[str, Engine]):
    """Opens the indices; `start` makes them ready, `stop` closes them. Its keys are the indices' names.

    Attributes:
        worker: of all indices' models.
        reloads: of new generations, by the index and what became of them: "done", "refused" or "failed".

    Raises:
        LoadError, FileNotFoundError, ValueError: as `load_engine`; or two indices have one name.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings, self._served = settings, dict[str, _Served]()
        self.reloads: Counter[tuple[str, str]] = Counter()
        if not settings.indices:
            raise ValueError("no indices to serve; give at least one")
        for asked in settings.indices:
            manifest = _manifest_digest(asked)  # before it is opened: what is published meanwhile is seen later
            engine = load_engine(asked, settings)
            if engine.name in self._served:
                raise ValueError(f"two indices are named {engine.name}: give one another name, as NAME=PATH")
            self._served[engine.name] = _Served(asked=asked, engine=engine, manifest=manifest)
        self._aliases: dict[str, str] = {}
        self.alias(settings.aliases)
        self.worker = ModelWorker(settings, settings.indices[0].device)
        self._is_asked = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    def __getitem__(self, name: str) -> Engine:
        return self._served[name].engine

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    def index_name(self, name: str) -> str:
        """The name of the index that this alias stands for now; what is no alias stands for itself."""
        return self._aliases.get(name, name)

    def alias(self, aliases: Mapping[str, str]) -> None:
        """Takes all of these aliases at once, in place of those before.

        Raises:
            SettingsError: one is an index's own name, or of an index that is not served; those before stay.
        """
        check_aliases(aliases, self._served)
        self._aliases = dict(aliases)

    async def start(self, on_ready: Callable[[str], Awaitable[None]]) -> None:
        """Warms every index up, and from then on looks for new generations."""
        for name, served in self._served.items():
            await served.engine.warm_up(self.worker)
            await on_ready(name)
        self._watching = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.wait([self._watching])
        for served in self._served.values():
            await asyncio.to_thread(served.engine.close)
        await self.worker.stop()

    def look(self) -> None:
        """Looks for new generations now, and does not wait for the next time."""
        self._is_asked.set()

    async def _watch(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._is_asked.wait(), self._settings.reload_poll_s or None)
            self._is_asked.clear()
            for name in self._served:
                try:
                    await self._refresh(name)
                except Exception:
                    self.reloads[name, "failed"] += 1
                    _log.exception("index %s could not be looked at", name)

    async def _refresh(self, name: str) -> None:
        served = self._served[name]
        manifest = await asyncio.to_thread(_manifest_digest, served.asked)
        if manifest == served.manifest:
            return
        served.manifest = manifest
        try:
            engine = await self._opened(served.asked)
        except Exception as error:
            is_its_fault = not isinstance(error, StorageError | UnavailableError)
            if not is_its_fault:  # look again the next time
                served.manifest = ""
            self.reloads[name, "refused" if is_its_fault else "failed"] += 1
            _log.error("a new generation of index %s is refused, generation %d goes on: %s", name,
                       served.engine.index.generation, error)  # fmt: skip
            return
        _log.info("index %s answers from generation %d, no more from %d", name, engine.index.generation,
                  served.engine.index.generation)  # fmt: skip
        self.reloads[name, "done"] += 1
        served.engine = engine  # the old one closes when the last request lets it go

    async def _opened(self, asked: IndexSettings) -> Engine:
        engine = await asyncio.to_thread(load_engine, asked, self._settings)
        await engine.warm_up(self.worker)
        return engine


def _manifest_digest(asked: IndexSettings) -> str:
    try:
        return hashlib.sha256(open_folder(asked.path).read(MANIFEST)).hexdigest()
    except FileNotFoundError:
        return "none"  # being replaced, or gone: to open it says which
