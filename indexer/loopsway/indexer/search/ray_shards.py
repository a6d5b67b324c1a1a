"""The shards of an index in actors on a Ray cluster, each opened by address, and started again when it dies.

A shard is asked once it is open and warm. One that does not answer in time is waited for no longer, and while it owes
`MOST_LATE` such answers it is not asked. A thread of this process hears of a shard's death within `BEAT_S`, and has
another actor open its rows; answers do without them meanwhile.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cluster import RayError, RayTaskError, connect, ray
from .device_scan import device_scan
from .index import Index, open_index
from .nearest import GoOn
from .sharded import Method, ShardedReader, own_rows, shard_rows

_log = logging.getLogger(__name__)

TIMEOUT_S = 60.0  # for an answer whose caller names no deadline
BEAT_S = 0.5
RETRY_S, LONGEST_RETRY_S = 1.0, 30.0  # between attempts to open a shard again
NEWS_S = 30.0  # between words about shards that have not started
MOST_LATE = 2


def open_ray_index(
    path: str | Path,
    *,
    generation: int | None = None,
    name: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    device_bytes: int | None = None,
    address: str | None = None,
) -> Index:
    """Opens an index whose codes are read in actors. Its answers are those of `open_index`. To be closed.

    This process looks up the rows that it is asked about by id, the examples' table, factors and norms; searches,
    scores and comparisons with all rows are the actors'. They keep the generation that was opened.

    Args:
        path: a folder that all nodes share, or a URL.
        generation: as in `open_index`.
        name: as in `open_index`.
        workers: number of shards, at most the index's blocks; None: one for each GPU of the cluster, or each node.
        device: "cuda" for actors with a GPU each; "cpu".
        device_bytes: as in `open_index`, of each actor.
        address: of the cluster; None: that of RAY_ADDRESS, or one that is started here and ends with
            this process.

    Raises:
        IndexNotFoundError, IndexDamagedError, StorageError, ValueError: as `open_index`, here or in an actor.
    """
    index = open_index(path, generation=generation, name=name)
    connect(address)
    on_gpus = device.startswith("cuda")
    nodes = sum(node["Alive"] for node in ray.nodes())
    workers = workers or max(1, int(ray.cluster_resources().get("GPU", 0)) if on_gpus else nodes)
    opening = _Opening(
        address=index.folder.address,
        generation=index.generation,
        device=device,
        device_bytes=device_bytes,
        beside=-(-workers // nodes),
    )
    shards = RayShards(opening, shard_rows(index.blocks(), workers), on_gpus=on_gpus)
    index.reader = ShardedReader(shards)
    return index


@dataclass(frozen=True, kw_only=True)
class _Opening:
    """How an actor opens its rows.

    Attributes:
        beside: actors on its node, which share the processors.
    """

    address: str
    generation: int
    device: str
    device_bytes: int | None
    beside: int


@dataclass(kw_only=True, eq=False)
class _Place:
    """A shard as this process sees it.

    Attributes:
        rows: that it reads.
        actor: that does; None between two.
        beat: the call whose end says that the actor is open, and later that it lives, or has died.
        is_open: whether it can be asked.
        late: calls that nobody waits for any more.
        failures: attempts to open it since it was open.
        next_s: when to try again, by `time.monotonic()`.
    """

    rows: range
    actor: Any = None
    beat: Any = None
    is_open: bool = False
    late: list[Any] = field(default_factory=list)
    failures: int = 0
    next_s: float = 0.0


class RayShards:
    """As `Shards`. Made by `open_ray_index`."""

    def __init__(self, opening: _Opening, rows: Sequence[range], *, on_gpus: bool) -> None:
        self._opening = opening
        self._amount = {"num_gpus": 1} if on_gpus else {"num_cpus": 1}
        self._places = [_Place(rows=own) for own in rows]
        self._lock = threading.Lock()
        self._woken, self._closing = threading.Event(), threading.Event()
        watched = weakref.ref(self), self._woken, self._closing
        self._watch = threading.Thread(target=_keep_alive, args=watched, name="loopsway-shards", daemon=True)
        try:
            self._start_all()
        except BaseException:
            self._let_go()
            raise
        self._watch.start()

    @property
    def rows(self) -> Sequence[range]:
        return [place.rows for place in self._places]

    def ask(
        self,
        method: Method,
        arguments: Sequence[Any],
        *,
        kept: np.ndarray | None,
        deadline: float | None,
        go_on: GoOn | None = None,
    ) -> list[Any]:
        until = time.monotonic() + TIMEOUT_S
        until = until if deadline is None else min(until, deadline)
        shared = ray.put(tuple(arguments))
        calls: dict[int, Any] = {}
        with self._lock:
            for number, place in enumerate(self._places):
                if place.is_open and self._num_late(place) < MOST_LATE:
                    own = own_rows(method, place.rows, kept)
                    calls[number] = place.actor.answer.remote(method, shared, own)
        waited = list(calls.values())
        if waited:
            ray.wait(waited, num_returns=len(waited), timeout=max(0.0, until - time.monotonic()))
        return [self._answer(self._places[number], calls.get(number)) for number in range(len(self._places))]

    def warm_up(self) -> None:
        """Actors are warm before they are asked."""

    def close(self) -> None:
        self._closing.set()
        self._woken.set()
        self._watch.join()
        self._let_go()

    def _answer(self, place: _Place, call: Any) -> Any:
        """What a call gave; None if it did not end in time, or its actor died."""
        if call is None:
            return None
        if not _has_ended(call):
            with self._lock:
                place.late.append(call)
            return None
        try:
            return ray.get(call)
        except RayTaskError as error:
            raise error.cause from None
        except RayError:
            self._woken.set()
            return None

    @staticmethod
    def _num_late(place: _Place) -> int:
        place.late = [call for call in place.late if not _has_ended(call)]
        return len(place.late)

    def _start_all(self) -> None:
        """Returns once all are open; raises what keeps one from it."""
        for place in self._places:
            self._start(place)
        waiting = [place.beat for place in self._places]
        while waiting:
            started, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=NEWS_S)
            try:
                ray.get(started)
            except RayTaskError as error:
                raise error.cause from None
            if waiting:
                _log.warning(
                    "%d of %d shards of %s have not started: they wait for %s of the cluster, or read their codes",
                    len(waiting), len(self._places), self._opening.address, ", ".join(self._amount),
                )  # fmt: skip
        for place in self._places:
            self._opened(place)

    def _start(self, place: _Place) -> None:
        actor: Any = ray.remote(_Shard)
        place.actor = actor.options(**self._amount, max_restarts=0, scheduling_strategy="SPREAD").remote(sys.path)
        place.beat = place.actor.open.remote(self._opening, place.rows)

    def _opened(self, place: _Place) -> None:
        with self._lock:
            place.is_open, place.failures, place.late = True, 0, []
        place.beat = place.actor.beat.remote()

    def look(self) -> None:
        """Hears of each shard, and starts those again that are lost."""
        for place in self._places:
            if place.actor is not None:
                self._hear(place)
            elif time.monotonic() >= place.next_s:
                self._start(place)

    def _hear(self, place: _Place) -> None:
        """Notes what has become of a shard since it was last heard of."""
        if not _has_ended(place.beat):
            return
        try:
            ray.get(place.beat)
        except RayError as error:
            self._lost(place, error)
            return
        if not place.is_open:
            _log.warning("the shard of rows %d to %d is open again", place.rows.start, place.rows.stop - 1)
            self._opened(place)
        else:
            place.beat = place.actor.beat.remote()

    def _lost(self, place: _Place, error: RayError) -> None:
        reason = error.cause if isinstance(error, RayTaskError) else str(error).splitlines()[0]
        _log.warning(
            "the shard of rows %d to %d of %s is lost, and started again: %s",
            place.rows.start, place.rows.stop - 1, self._opening.address, reason,
        )  # fmt: skip
        with self._lock:
            was_open, place.is_open = place.is_open, False
        ray.kill(place.actor)
        place.actor = place.beat = None
        place.failures += not was_open
        delay_s = min(LONGEST_RETRY_S, RETRY_S * 2 ** (place.failures - 1)) if place.failures else 0.0
        place.next_s = time.monotonic() + delay_s
        self._woken.set()

    def _let_go(self) -> None:
        if not ray.is_initialized():
            return
        for place in self._places:
            if place.actor is not None:
                ray.kill(place.actor)


class _Shard:
    """An actor: an index that is open on some rows."""

    def __init__(self, path: list[str]) -> None:
        sys.path[:] = path

    def open(self, opening: _Opening, rows: range) -> None:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // opening.beside))
        scan = device_scan(opening.device, opening.device_bytes)
        index = Index(opening.address, opening.generation, scan, rows)
        self._reader = index.codes
        self._reader.warm_up()
        noise = np.random.default_rng(0).standard_normal((1, index.width)).astype(np.float32)
        self._reader.search(dict.fromkeys([*range(index.num_steps), None], noise), 1, None, kept=None)

    def beat(self) -> None:
        pass

    def answer(self, method: Method, arguments: tuple[Any, ...], own: dict[str, Any]) -> Any:
        return getattr(self._reader, method)(*arguments, **own)


def _keep_alive(watched: weakref.ref[RayShards], woken: threading.Event, closing: threading.Event) -> None:
    """Looks after shards until they are closed, or nobody holds them any more: then Ray ends their actors."""
    while True:
        woken.wait(BEAT_S)
        woken.clear()
        shards = watched()
        if shards is None or closing.is_set() or not ray.is_initialized():
            return
        shards.look()
        del shards


def _has_ended(call: Any) -> bool:
    return bool(ray.wait([call], timeout=0)[0])
