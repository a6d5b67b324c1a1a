"""Scans the codes of slots on a torch device, and keeps as many of them there as it may.

N rows, n rows of a tile, M queries, W width, L stored values of a row.

The device gives *candidates*, rows of largest bounds of their scores, and a limit that no other row is above; more of
them while one that is left out could be better. Scores are made from the codes elsewhere, so that answers do not depend
on the device. A tile of codes becomes numbers on the device, which its matrix product takes: float16, or float32 where
float16 would be slow or its sums would be rounded to float16.

A query is rounded to float16. It, and rows of up to 16 bits, keep their values in tensor cores (float16 and TF32 have
the same eleven bits), and what rows of 32 bits lose there is part of the limit. So limits hold with TF32 and without,
and no setting of torch's, which are the whole program's, is touched.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..memory import is_out_of_memory
from ..sketches.coding import code_shape, decode
from .coded_queries import ROUNDING, by_peaks, slack_of
from .scan import Answer, Rows, Score, ranked, scored

EXTRA, WIDENING = 16, 8  # candidates beyond k; more, times this, while one that is left out could be better
TILE_BYTES = 256 << 20  # of what is made of a tile's codes: each tile costs a dozen launches
SHARE = 0.5  # of a device's free memory that codes may take; the model and its batches need the rest
# Of |query| |row| for each of W products: tensor cores add four or more at once, and cut off what is below the last of
# 24 bits of the sum.
TRUNCATION = 2.0**-26
TF32_LOSS = 2.0**-10  # of a float32, at most, where TF32 cuts it off

_WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}  # by their bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Rows that may be among the best, of one sign.

    Attributes:
        rows: int64 [M, c], those of the largest bounds; fewer than asked for only if there are no more.
        limits: float32 [M], no row that is left out scores more; -inf if none is.
    """

    rows: np.ndarray
    limits: np.ndarray


class DeviceScan:
    """Scans on one device, and holds codes there. Thread-safe.

    A slot's codes are held from its first scan on; those of the slots that were not used for longest leave for them. A
    slot that is larger than all that may be held is copied block by block in each scan. Each thread that scans may
    need one slot and a few tiles more while it does. Where memory runs out, all held codes leave, and it tries once
    more.

    Args:
        device: where.
        budget_bytes: of codes that are held. None: half of what is free at the first scan, and nothing where the device
            does not tell.
    """

    def __init__(self, device: torch.device, budget_bytes: int | None = None) -> None:
        self.device, self._budget = device, budget_bytes
        self._held: dict[Hashable, Tensor] = {}  # the last used last
        self._lock = threading.Lock()

    @property
    def held(self) -> list[Hashable]:
        """Names of the slots whose codes are on the device, the least recently used first."""
        with self._lock:
            return list(self._held)

    def scan(self, name: Hashable, queries: np.ndarray, bits: int, rows: Rows, k: int, score: Score) -> list[Answer]:
        """As `scan.scan`, of a slot by its name, which stands for its codes; rows that are kept may differ."""
        answers: dict[int, Answer] = {}
        count = k + EXTRA
        while waiting := [query for query in range(len(queries)) if query not in answers]:
            largest, smallest = self.candidates(name, queries[waiting], bits, rows, count)
            both = [np.union1d(*each) for each in zip(largest.rows, smallest.rows, strict=True)]
            scores = scored(score, list(zip(waiting, both, strict=True)))
            found = [ranked(*each) for each in zip(both, scores, strict=True)]
            for query, answer, upper, lower in zip(waiting, found, largest.limits, smallest.limits, strict=True):
                if _is_whole(answer[1], upper, k) and _is_whole(-answer[1][::-1], lower, k):
                    answers[query] = answer
            count *= WIDENING
        return [answers[query] for query in range(len(queries))]

    def candidates(
        self, name: Hashable, queries: np.ndarray, bits: int, rows: Rows, count: int
    ) -> tuple[Candidates, Candidates]:
        """`count` rows of largest and of smallest inner product with each query, or all there are.

        Returns:
            Candidates of each sign; the second's limits are of the negated scores.

        Raises:
            RuntimeError: the device has too little memory even without held codes.
        """
        try:
            return self._candidates(name, queries, bits, rows, count)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._let_go(str(error))
        # Out here, where the error no longer keeps what the first attempt had allocated.
        return self._candidates(name, queries, bits, rows, count)

    def _candidates(
        self, name: Hashable, queries: np.ndarray, bits: int, rows: Rows, count: int
    ) -> tuple[Candidates, Candidates]:
        unit, peaks = by_peaks(queries)
        coded = unit.astype(np.float16)
        slack = slack_of(unit, coded, _rounding(queries.shape[1], bits)) * np.float32(rows.longest)
        tiles = _Tiles(self.device, coded, slack, bits, rows)
        best = torch.empty((2 * len(queries), 0), dtype=torch.float32, device=self.device)  # bounds, and whose they are
        whose = torch.empty((2 * len(queries), 0), dtype=torch.int64, device=self.device)
        for own, codes in tiles.split(self._codes(name, rows, code_shape(queries.shape[1], bits))):
            values, places = _largest(tiles.bounds(own, codes), count + 1)
            best, order = _largest(torch.cat([best, values], dim=1), count + 1)
            whose = torch.cat([whose, places + own.start], dim=1).gather(1, order)
        bounds, found = (each.cpu().numpy().reshape(2, len(queries), -1) for each in (best, whose))
        return _best_of(bounds[0], found[0], peaks, count), _best_of(bounds[1], found[1], peaks, count)

    def _codes(self, name: Hashable, rows: Rows, shape: tuple[int, np.dtype]) -> Iterator[tuple[range, Tensor]]:
        """The codes of all rows on the device, or of block after block; then they are held from now on, if they may."""
        with self._lock:
            held = self._held.pop(name, None)
            if held is not None:
                self._held[name] = held
        if held is not None:
            yield range(len(held)), held
            return
        length, kind = shape[0], torch.from_numpy(np.empty(0, shape[1])).dtype
        room = self._room((len(rows.factors), length), kind)
        longest = max(map(len, rows.blocks))
        staged = torch.empty((longest, length), dtype=kind, pin_memory=self.device.type == "cuda")
        for block, own in enumerate(rows.blocks):
            if room is None and not rows.any_kept(own):
                continue
            here = staged[: len(own)]
            here.numpy()[:] = rows.codes(block)
            there = torch.empty_like(here, device=self.device) if room is None else room[own.start : own.stop]
            yield own, there.copy_(here)  # which waits for the copy: `staged` is free again
        if room is not None:
            self._hold(name, room)

    def _room(self, shape: tuple[int, int], kind: torch.dtype) -> Tensor | None:
        """Memory for a slot's codes, or None."""
        with self._lock:
            if self._budget is None:
                self._budget = _free_share(self.device)
            if not self._vacated(math.prod(shape) * kind.itemsize):
                return None
            try:
                return torch.empty(shape, dtype=kind, device=self.device)
            except RuntimeError as error:  # torch.OutOfMemoryError, on CUDA
                self._budget = sum(codes.nbytes for codes in self._held.values())
                _log.warning(
                    "%s has no memory left for the codes of a slot: from now on at most %d bytes of codes stay there, "
                    "and others are copied in each search (%s)", self.device, self._budget, str(error).split("\n")[0]
                )  # fmt: skip
                return None

    def _let_go(self, reason: str) -> None:
        """Frees all held codes; from now on as many may be held as now seems well."""
        with self._lock:
            freed = sum(codes.nbytes for codes in self._held.values())
            self._held.clear()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._budget = min(self._budget or 0, _free_share(self.device))
        _log.warning(
            "%s has no memory left for a search: %d bytes of codes left it, and at most %d stay there from now on (%s)",
            self.device, freed, self._budget, reason.split("\n")[0],
        )  # fmt: skip

    def _hold(self, name: Hashable, codes: Tensor) -> None:
        with self._lock:
            self._held.pop(name, None)  # another thread's, which scanned the slot at the same time
            if self._vacated(codes.nbytes):
                self._held[name] = codes

    def _vacated(self, size: int) -> bool:
        """Whether so many bytes may be held beside those that are, of which the least recently used leave for them."""
        assert self._budget is not None
        if size > self._budget:
            return False
        while sum(codes.nbytes for codes in self._held.values()) + size > self._budget:
            del self._held[next(iter(self._held))]
        return True


class _Tiles:
    """What a scan needs on the device beside the codes, and the bounds that it makes of them."""

    def __init__(self, device: torch.device, coded: np.ndarray, slack: np.ndarray, bits: int, rows: Rows) -> None:
        self._rows, self._kind = rows, _multiplied(device, bits)
        self._queries = torch.from_numpy(coded).to(device, self._kind)  # [M, W]
        self._slack = torch.from_numpy(slack).to(device)[:, None]  # [M, 1]
        self._factors = torch.tensor(rows.factors, device=device)  # [N]
        self._left_out = None if rows.kept is None else torch.from_numpy(~rows.kept).to(device)  # [N]
        self._cells: Tensor | None = None  # [256, 8 / b], what each byte of codes stands for
        if bits <= 8:
            every_byte = np.arange(256, dtype=np.uint8)[:, None]
            self._cells = torch.from_numpy(decode(every_byte, np.ones(256, np.float32), bits)).to(device, self._kind)

    def split(self, runs: Iterator[tuple[range, Tensor]]) -> Iterator[tuple[range, Tensor]]:
        """Runs of rows in tiles, without those of which no row is kept."""
        count, width = self._queries.shape
        for own, codes in runs:
            at_once = max(1, TILE_BYTES // (width * self._kind.itemsize + 4 * codes.shape[1] + 16 * count))
            for start in range(0, len(own), at_once):
                tile = own[start : start + at_once]
                if self._rows.any_kept(tile):
                    yield tile, codes[start : start + at_once]

    def bounds(self, own: range, codes: Tensor) -> Tensor:
        """Of the products, and of the negated ones, float32 [2 M, n]."""
        values = codes.to(self._kind) if self._cells is None else looked_up(self._cells, codes.flatten().int())
        products = _products(self._queries, values.view(len(own), -1))
        bounds = torch.cat([products + self._slack, self._slack - products])
        bounds *= self._factors[own.start : own.stop]
        if self._left_out is not None:
            bounds.masked_fill_(self._left_out[own.start : own.stop], -math.inf)
        return bounds


def looked_up(cells: Tensor, codes: Tensor) -> Tensor:
    """The rows of a table [256, c] by their numbers int32 [n], one after another, [n c].

    A row is copied as one number where there is a type of its size: a GPU's index_select takes fifty times as long over
    rows of so few bytes as writing them does.
    """
    word = _WORDS.get(cells.shape[1] * cells.itemsize)
    return (
        cells.index_select(0, codes).flatten() if word is None else cells.view(word).flatten()[codes].view(cells.dtype)
    )


def device_scan(device: str, budget_bytes: int | None = None) -> DeviceScan | None:
    """Of a device by its torch name; None for "cpu", which scan.py scans on.

    Raises:
        ValueError: torch does not know the device or can't use it, or budget_bytes is negative.
    """
    if budget_bytes is not None and budget_bytes < 0:
        raise ValueError(f"device_bytes is {budget_bytes}, expected at least 0 (copies codes in each search), or None")
    try:
        where = torch.device(device)
        torch.zeros(1, device=where).cpu()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} can't be used: {str(error).splitlines()[0]}. Expected a torch device that this machine "
            f"and this torch ({torch.__version__}) have, such as 'cuda'; with device='cpu' searches need none"
        ) from error
    return None if where.type == "cpu" else DeviceScan(where, budget_bytes)


def _best_of(values: np.ndarray, rows: np.ndarray, peaks: np.ndarray, count: int) -> Candidates:
    """The rows of the `count` largest bounds [M, n] of queries over their peaks, of n > count or of all there are."""
    order = np.argsort(-values, axis=1)
    rows, values = np.take_along_axis(rows, order, axis=1), np.take_along_axis(values, order, axis=1)
    found = min(count, int(np.isfinite(values).sum(1).min()))  # rows that are not kept are -inf
    limits = values[:, count] * peaks if values.shape[1] > count else np.full(len(values), -np.inf, np.float32)
    return Candidates(rows=rows[:, :found], limits=limits)


def _is_whole(scores: np.ndarray, limit: float, k: int) -> bool:
    """Whether no row that was left out is among the k of largest positive score.

    Args:
        scores: of the candidates, the largest first.
        limit: no row that was left out scores more.
        k: how many are wanted.
    """
    return limit <= 0 or (len(scores) >= k and scores[k - 1] > limit)


def _rounding(width: int, bits: int) -> float:
    """Of |query| |row|, what a product may lose on a device."""
    return ROUNDING + width * TRUNCATION + (TF32_LOSS if bits == 32 else 0.0)


def _multiplied(device: torch.device, bits: int) -> torch.dtype:
    """The type of products: float16 where their sums can be float32, and the program has not asked for others."""
    if bits > 16 or device.type != "cuda" or torch.version.cuda is None or torch.__version__ < "2.8":
        return torch.float32
    return torch.float32 if torch.backends.cuda.matmul.allow_fp16_accumulation else torch.float16


def _products(queries: Tensor, rows: Tensor) -> Tensor:
    """Float32 [M, n] of queries [M, W] and rows [n, W] of one type."""
    return torch.mm(queries, rows.T, torch.float32) if rows.dtype == torch.float16 else queries @ rows.T


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of each row, or all, in no order, and their places."""
    best = values.topk(min(count, values.shape[1]), dim=1, sorted=False)
    return best.values, best.indices


def _free_share(device: torch.device) -> int:
    memory = getattr(torch.get_device_module(device), "mem_get_info", None)
    return 0 if memory is None else int(SHARE * memory(device)[0])
