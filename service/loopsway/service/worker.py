"""The server's side of the model process: starts it, talks to it, and starts it again when it dies.

What was under way in a process that died is unavailable; what waits for the next one goes on there. A process that dies
again and again is started after ever longer pauses, in which queries for it are refused at once. A model that a new
process can't load is tried again with a query for it, with such pauses too. Searches need none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from loopsway.indexer import LoadError

from .errors import UnavailableError
from .frames import Message
from .gradient_sketches import ModelSketch
from .model_life import Life, Reply
from .settings import Settings

# Before the second start and the later ones, the first being at once; and before what failed to load is tried again.
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0

_log = logging.getLogger(__name__)


class ModelWorker:
    """The model process of one server, started when it is first needed. Use it within one event loop, and stop it.

    Args:
        settings: the limits.

    Attributes:
        num_starts: of processes so far.
        batches: by the index's name, how many batches of each size were sketched.
        num_sketches: begun so far, out of gradients.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loads: dict[str, Message] = {}  # what every process is told to load, by key
        self._unloaded: dict[str, _Unloaded] = {}  # what a later process could not load again, by key
        self._life: Life | None = None
        self._starting: asyncio.Task[Life] | None = None
        self._failures, self._next_start, self._is_stopped = 0, 0.0, False
        self.num_starts = self.num_sketches = 0
        self.batches: defaultdict[str, Counter[int]] = defaultdict(Counter)

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        return self._life.process.pid if self._life is not None else None

    @property
    def loaded(self) -> list[str]:
        """Keys of what is loaded."""
        return list(self._loads)

    @property
    def held(self) -> tuple[int, int]:
        """How many checkpoints' weights are in its memory, and their bytes, as it last said."""
        return self._life.held if self._life is not None else (0, 0)

    async def load(self, key: str, facts: Message) -> None:
        """Loads a task and its models, in this process and in every later one.

        Raises:
            LoadError: it can't be loaded, or makes other sketches than its index holds.
            UnavailableError: the process died.
        """
        life = await self._alive()
        self._loads[key] = facts
        try:
            await self._load(life, key)
        except BaseException:
            self.forget(key)
            raise

    def forget(self, key: str) -> None:
        """Frees what was loaded under this key."""
        self._unloaded.pop(key, None)
        if self._loads.pop(key, None) is not None and self._life is not None:
            self._life.tell({"kind": "forget", "key": key})

    async def sketch(self, key: str, items: Sequence[Message]) -> Reply:
        """Sketches examples of a task together; cancelled, it costs no more than one checkpoint's batch.

        Raises:
            UnavailableError: the process died, or dies again and again, or a later one could not load the task so far.
            ValueError: the examples can't be run.
            TaskError, RuntimeError: the task failed.
        """
        life = await self._with_loaded(key)
        reply = await life.request({"kind": "sketch", "key": key, "items": items})
        self._failures = 0
        if (facts := self._loads.get(key)) is not None:  # not forgotten meanwhile
            self.batches[facts["name"]][len(items)] += 1
        return reply

    async def begin_gradients(self, key: str, num_steps: int) -> ModelSketch:
        """The sketch of a query of so many steps that comes as gradients; close it.

        Raises:
            UnavailableError: the process died, or dies again and again.
        """
        life = await self._with_loaded(key)
        self.num_sketches = number = self.num_sketches + 1
        await life.request({"kind": "begin_gradients", "key": key, "number": number, "num_steps": num_steps})
        return ModelSketch(life, number)

    async def stop(self) -> None:
        """Ends the process."""
        self._is_stopped = True
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.wait([self._starting])
        if self._life is not None:
            await self._life.end()
            self._life = None

    async def _with_loaded(self, key: str) -> Life:
        """The process, with what was loaded under this key."""
        life = await self._alive()
        if key in self._unloaded:
            await self._load_late(life, key)
        return life

    async def _alive(self) -> Life:
        """The process, started if there is none."""
        if self._life is not None:
            return self._life
        pause = self._next_start - time.monotonic()
        if pause > 0 or self._is_stopped:
            raise UnavailableError(
                "the model's process died and is not started again yet", retry_after_s=max(pause, 0.1)
            )
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start())
        return await asyncio.shield(self._starting)

    async def _start(self) -> Life:
        life = await Life.begin(self._settings)
        self.num_starts += 1
        try:
            for key in list(self._loads):
                await self._load_again(life, key)
        except BaseException as error:
            await life.end()
            if not isinstance(error, asyncio.CancelledError):
                self._plan_next_start()
            raise
        self._life = life
        life.reading.add_done_callback(lambda _: self._on_end(life))
        return life

    async def _load(self, life: Life, key: str) -> None:
        facts = self._loads[key] | {"batch_size": self._settings.batch_size}
        try:
            await life.request({"kind": "load", "key": key} | facts)
        except ValueError as error:
            raise LoadError(str(error)) from error

    async def _load_again(self, life: Life, key: str) -> None:
        """In a later process; what can't be loaded is noted, and may be when its pause is over.

        Raises:
            UnavailableError: this process died, too.
        """
        failures = self._unloaded[key].failures + 1 if key in self._unloaded else 1
        try:
            await self._load(life, key)
        except UnavailableError:
            raise
        except (LoadError, RuntimeError) as error:
            self._unloaded[key] = _Unloaded(failures, time.monotonic() + _pause(failures))
            _log.error("the model of %s can't be loaded again: %s", key, error)
        else:
            self._unloaded.pop(key, None)

    async def _load_late(self, life: Life, key: str) -> None:
        """For a query, what could not be loaded when the process started."""
        if time.monotonic() >= self._unloaded[key].next_load:
            await self._load_again(life, key)
        if unloaded := self._unloaded.get(key):
            pause = unloaded.next_load - time.monotonic()
            raise UnavailableError(
                "the model's process died, and the new one could not load the model; it is tried again",
                retry_after_s=max(pause, 0.1),
            )
        _log.info("the model of %s is loaded again", key)

    def _on_end(self, life: Life) -> None:
        """The process died, unless this server ended it."""
        if self._life is not life or self._is_stopped:
            return
        self._life = None
        _log.error("the model's process %d died; queries under way were answered UNAVAILABLE", life.process.pid)
        asyncio.create_task(life.end())  # noqa: RUF006  # collects its exit status, whenever
        self._plan_next_start()

    def _plan_next_start(self) -> None:
        """It does not wait for a query, so that the next one finds its model loaded."""
        pause = _pause(self._failures) if self._failures else 0.0
        self._failures += 1
        self._next_start = time.monotonic() + pause
        asyncio.get_running_loop().call_later(pause, self._restart)

    def _restart(self) -> None:
        if self._life is None and not self._is_stopped and (self._starting is None or self._starting.done()):
            self._starting = asyncio.create_task(self._start())
            self._starting.add_done_callback(_note)


@dataclass(frozen=True)
class _Unloaded:
    """What a later process could not load again.

    Attributes:
        failures: how often.
        next_load: when it may be tried again, by the monotonic clock.
    """

    failures: int
    next_load: float


def _pause(failures: int) -> float:
    return min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 100), LONGEST_PAUSE_S)  # a year of failures is no overflow


def _note(starting: asyncio.Task[Life]) -> None:
    if not starting.cancelled() and (error := starting.exception()) is not None:
        _log.error("the model's process could not be started again: %s", error)
