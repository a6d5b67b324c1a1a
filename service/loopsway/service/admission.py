"""Which requests an index lets in: few enough that those who wait are answered soon.

Parts of requests are done in the order in which these came, so that a request waits for what was let in before it and
for nothing else. How long that takes is learned from what was done last, beside whatever else kept the processors busy.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Literal, TypeAlias

from .errors import QueueFullError
from .settings import Settings

StageName: TypeAlias = Literal["sketch", "rank", "measure", "score", "compare"]

KEPT = 0.9  # of what is known of a pace, each time that something is done


class Stage:
    """One kind of work: how much of it is let in and not done yet, and how fast it goes.

    Args:
        num_places: things of it that are done at once.

    Attributes:
        num_waiting: things that wait or are being done.
    """

    def __init__(self, num_places: int) -> None:
        self.num_waiting = 0
        self._num_places = num_places
        self._seconds = self._count = 0.0
        self._under_way: list[tuple[float, int]] = []  # when it was begun, and how many

    @property
    def expected_s(self) -> float:
        """How long what waits will take; 0 as long as nothing is known."""
        if not self._count:
            return 0.0
        learned, now = self._seconds / self._count, time.monotonic()
        # As if what is under way were done now: that all of it takes longer than it used to shows first there.
        seconds = KEPT * self._seconds + sum(now - begin for begin, _ in self._under_way)
        seen = seconds / (KEPT * self._count + sum(count for _, count in self._under_way))
        return self.num_waiting * max(learned, seen) / self._num_places

    @contextmanager
    def doing(self, count: int) -> Iterator[None]:
        """So many are done in here together, in one place; how long that takes is learned, unless it fails."""
        under_way = (time.monotonic(), count)
        self._under_way.append(under_way)
        try:
            yield
            self._seconds = KEPT * self._seconds + time.monotonic() - under_way[0]
            self._count = KEPT * self._count + count
        finally:
            self._under_way.remove(under_way)

    def forget(self) -> None:
        """Unlearns the pace: it was that of first times."""
        self._seconds = self._count = 0.0


@dataclass(kw_only=True, eq=False)
class Place:
    """One request that was let in.

    Attributes:
        number: ascends; parts of the request with the lowest are done first.
        stages: what is still to be done of it, by kind.
    """

    number: int
    stages: dict[Stage, int] = field(default_factory=dict)

    def left(self, stage: Stage) -> int:
        """How much of this kind is still to be done."""
        return self.stages.get(stage, 0)

    def passed(self, stage: Stage) -> None:
        """Nothing of this kind is left to be done."""
        stage.num_waiting -= self.stages.pop(stage, 0)


class Admission:
    """The requests of one index that run or wait. Use it within one event loop.

    Args:
        name: of the index, for errors.
        settings: the limits.

    Attributes:
        stages: by their names.
        num_admitted: requests that run or wait now.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        self._name, self._settings, self._numbers = name, settings, count(1)
        threads = settings.search_threads
        self.stages: dict[StageName, Stage] = {
            "sketch": Stage(1),
            **{each: Stage(threads) for each in ("rank", "measure", "score", "compare")},
        }
        self.num_admitted = 0

    @contextmanager
    def place(self, work: Mapping[StageName, int], *, has_thread: bool) -> Iterator[Place]:
        """Lets a request in.

        Args:
            work: queries that it has for each kind.
            has_thread: whether a thread is free for it: then it waits for the model alone.

        Raises:
            QueueFullError: too many wait, or it would wait for too long.
        """
        self._check(self.expected_wait_s(for_model=bool(work.get("sketch")), for_thread=not has_thread))
        place = Place(number=next(self._numbers))
        for name, num_items in work.items():
            stage = self.stages[name]
            stage.num_waiting += num_items
            place.stages[stage] = num_items
        self.num_admitted += 1
        try:
            yield place
        finally:
            self.num_admitted -= 1
            for stage in list(place.stages):
                place.passed(stage)

    def expected_wait_s(self, *, for_model: bool, for_thread: bool) -> float:
        """For how long a request that comes now is expected to wait for the model, for a thread, or for both."""
        return sum(
            stage.expected_s for name, stage in self.stages.items() if (for_model if name == "sketch" else for_thread)
        )

    def _check(self, expected_s: float) -> None:
        settings = self._settings
        if self.num_admitted > settings.max_waiting:
            raise QueueFullError(
                f"index {self._name} has {settings.max_waiting} requests waiting, as many as it admits",
                retry_after_s=settings.retry_after_s,
            )
        if expected_s > settings.max_wait_s:
            raise QueueFullError(
                f"index {self._name} has work for {expected_s:.1f} s before this, expected at most "
                f"{settings.max_wait_s:g} s",
                retry_after_s=max(settings.retry_after_s, expected_s - settings.max_wait_s),
            )
