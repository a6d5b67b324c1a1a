"""One served index: the generation that answers now, and the newer one that takes its place or is refused.

A new generation is opened, compared with its digests and warmed up beside the old one, and then takes its place.
Requests that run meanwhile finish on the old one, which is closed with the last of them. One that is damaged, or can't
be opened, is refused, and the old one stays; when a server starts, that is the newest one that can be opened.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from loopsway.indexer import IndexDamagedError, LoadError, StorageError
from loopsway.indexer.memory import is_out_of_memory
from loopsway.indexer.store.addresses import open_folder
from loopsway.indexer.store.manifest import MANIFEST

from .engine import Engine
from .errors import UnavailableError
from .loading import earlier_sound, load_engine, newest_sound, published_generation
from .settings import IndexSettings, Settings
from .worker import ModelWorker

Outcome = Literal["done", "refused", "failed"]  # of a look that found something new

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RefusedGeneration:
    """A newer generation that is not answered from.

    Attributes:
        generation: its number; 0 where its manifest can't be read.
        reason: for callers, without a path or anything else that is the server's own.
        refused_at: when it was found.
        is_final: whether it is not tried again before another one is published; else it is at the next look.
    """

    generation: int
    reason: str
    refused_at: datetime
    is_final: bool


class ServedIndex:
    """An index in the generation that answers now. Use it within one event loop.

    Args:
        asked: which index, and how it is served.
        settings: of the server.

    Attributes:
        engine: of that generation.
        refused: the newer one that is not answered from. None: there is none.
        outcomes: how often a look ended so.

    Raises:
        LoadError, FileNotFoundError, ValueError: as `load_engine`.
    """

    def __init__(self, asked: IndexSettings, settings: Settings) -> None:
        self._asked, self._settings = asked, settings
        # Of the manifest that was last looked at, served or refused; "" to look again. It is read before the index is
        # opened: what is published meanwhile is seen later.
        self._digest = _manifest_digest(asked)
        self.refused: RefusedGeneration | None = None
        self.outcomes: Counter[Outcome] = Counter()
        self.engine, damage = newest_sound(asked, self._load)
        if damage is not None:
            self._refuse(damage, published_generation(asked))
        self._lock = asyncio.Lock()
        self._num_begun = self._num_done = 0  # looks that were asked for; of the last that ended well, its number

    async def start(self, worker: ModelWorker) -> None:
        """Warms it up, or the newest generation before it that can be."""
        async with self._lock:
            while True:
                try:
                    await self.engine.warm_up(worker)
                    return
                except IndexDamagedError as error:
                    await self._fall_back(error)

    async def look(self, worker: ModelWorker, *, again: bool = False) -> None:
        """Takes over what was published since the last look, or refuses it.

        Args:
            worker: of the models.
            again: try one that was refused anew, too; its files may have been mended. However many ask for that while
                one is tried, it is done once more for all of them.

        Raises:
            StorageError: the index's place can't be read.
        """
        arrived = self._num_begun
        async with self._lock:
            if again and self._num_done > arrived:  # that look began after this one was asked for
                return
            self._num_begun += again
            await self._look(worker, again)
            self._num_done = self._num_begun if again else self._num_done

    async def _look(self, worker: ModelWorker, again: bool) -> None:
        digest = await asyncio.to_thread(_manifest_digest, self._asked)
        if digest == self._digest and not (again and self.refused):
            return
        self._digest = digest
        try:
            engine = await self._opened(worker)
        except Exception as error:
            self._refuse(error, await asyncio.to_thread(published_generation, self._asked))
            return
        self._take(engine)

    def note_failure(self) -> None:
        """Counts a look that came to nothing."""
        self.outcomes["failed"] += 1

    async def _opened(self, worker: ModelWorker) -> Engine:
        engine = await asyncio.to_thread(self._load)
        try:
            await engine.compare(self.engine.index)
            await engine.warm_up(worker)
        except BaseException:
            engine.close()
            raise
        return engine

    async def _fall_back(self, damage: IndexDamagedError) -> None:
        """Puts an earlier generation in place of the one that answers; raises the damage if there is none."""
        damaged, newest = self.engine.index.generation, self.refused
        self.engine = await asyncio.to_thread(earlier_sound, self._asked, self._load, damaged, damage)
        self._refuse(damage, damaged)
        self.refused = newest or self.refused

    def _load(self, generation: int | None = None) -> Engine:
        return load_engine(self._asked, self._settings, generation=generation)

    def _take(self, engine: Engine) -> None:
        _log.info("index %s answers from generation %d, no more from %d", engine.name, engine.index.generation,
                  self.engine.index.generation)  # fmt: skip
        self.outcomes["done"] += 1
        self.refused = None
        self.engine = engine  # the old one closes when the last request lets it go

    def _refuse(self, error: Exception, generation: int | None) -> None:
        is_final = not (isinstance(error, StorageError | UnavailableError) or is_out_of_memory(error))
        if not is_final:
            self._digest = ""
        self.outcomes["refused" if is_final else "failed"] += 1
        self.refused = RefusedGeneration(
            generation=generation or 0, reason=_reason(error), refused_at=datetime.now(UTC), is_final=is_final
        )
        _log.error("generation %s of index %s is refused, it answers from generation %d: %s", generation or "unknown",
                   self.engine.name, self.engine.index.generation, error)  # fmt: skip


def _reason(error: Exception) -> str:
    """What is wrong, in words for callers; the log has the error's own."""
    match error:
        case IndexDamagedError():
            return "its files are damaged or incomplete; `loopsway verify` names them"
        case FileNotFoundError():
            return "there is no index at its place any more"
        case LoadError():
            return "its task can't be loaded, or makes other sketches than the index holds"
        case StorageError():
            return "its storage does not answer; it is tried again"
        case UnavailableError():
            return "the models' process does not answer, or memory ran out; it is tried again"
        case _ if is_out_of_memory(error):
            return "memory ran out; it is tried again"
        case _:
            return "it can't be opened or warmed up; the server's log says why"


def _manifest_digest(asked: IndexSettings) -> str:
    try:
        return hashlib.sha256(open_folder(asked.path).read(MANIFEST)).hexdigest()
    except FileNotFoundError:
        return "none"  # being replaced, or gone: to open it says which
