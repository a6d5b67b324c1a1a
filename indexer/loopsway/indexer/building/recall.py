"""How much of an exact answer a slot's FAISS indices find, and the effort that this takes.

M queries, Q given queries, T steps of them, S steps of the index, W width, k results of each sign.

Truth is the scan of every code. An approximate search is tried at an effort of 1, 2, 4, ... until its recall of
proponents and of opponents is no less than the floor, on each kind of queries:

- *held out*: stored rows, each looked up among the others, and random combinations of some (a row by itself has only as
  many values as its code, a query has any);
- *given*: sketches of real queries, which meet a slot as a search makes them meet it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..config import Approximation, Resolve
from ..search.ranking import TOTAL, pairs, slot_name
from ..search.slot import Slot

RECALL_QUERIES, RECALL_K = 16, 10  # of held-out queries, as many of either kind
ROWS_OF_A_QUERY = 8
HELD_OUT, GIVEN = "held_out", "given"

_Answer = tuple[np.ndarray, np.ndarray]  # rows and scores, as `Slot.search` gives them


class RecallError(ValueError):
    """At any effort, an index's FAISS files find less of the exact answers than its floor says."""


@dataclass(frozen=True, kw_only=True)
class Recall:
    """The share of the k strongest examples of a sign that an approximate search finds; 1 where there are none."""

    proponents: float
    opponents: float

    @property
    def least(self) -> float:
        return min(self.proponents, self.opponents)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a slot's FAISS indices find.

    Attributes:
        effort: that was needed.
        recalls: on each kind of queries.
    """

    effort: int
    recalls: Mapping[str, Recall]

    @property
    def least(self) -> float:
        return min(recall.least for recall in self.recalls.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Asked:
    """Queries of one kind, and their exact answers.

    Attributes:
        queries: float32 [M, W].
        left_out: int64 [M], the row that is in no answer of a query; -1: none.
        exact: as `Slot.search` gives them, of k + 1 of each sign.
    """

    queries: np.ndarray
    left_out: np.ndarray
    exact: Sequence[_Answer] = ()


def measured(slot: Slot, approximation: Approximation, given: np.ndarray | None, num_steps: int) -> Measured:
    """Tries a slot's FAISS indices at growing effort.

    Args:
        slot: whose indices are built.
        approximation: what they are and have to find.
        given: rotated sketches of real queries at each step and, last, of their sum, float32 [Q, T + 1, W].
        num_steps: S.

    Returns:
        What they find at the least effort that meets the floor; at full effort where none does.
    """
    asked = {HELD_OUT: _held_out(slot)}
    if given is not None:
        vectors = _meeting(slot.step, given, num_steps)
        asked[GIVEN] = _Asked(queries=vectors, left_out=np.full(len(vectors), -1))
    asked = {kind: replace(each, exact=slot.search(each.queries, RECALL_K + 1)) for kind, each in asked.items()}
    effort, full = 1, slot.full_effort(RECALL_K + 1)
    while True:
        found = Measured(effort=effort, recalls={kind: _recall(slot, each, effort) for kind, each in asked.items()})
        if found.least >= approximation.recall_floor or effort >= full:
            return found
        effort *= 2


def refuse_low(slot: Slot, approximation: Approximation, found: Measured) -> None:
    """Refuses indices that were not found good enough.

    Raises:
        RecallError: what was found is less than the floor.
    """
    if found.least < approximation.recall_floor:
        raise RecallError(_refusal(slot, approximation, found))


def recall_document(by_slot: Mapping[int | None, Measured], approximation: Approximation) -> dict[str, Any]:
    """What recall.json holds."""
    least = {slot_name(slot): found.least for slot, found in by_slot.items()}

    def of_kind(kind: str) -> dict[str, Any]:
        kept = {slot_name(slot): found.recalls[kind] for slot, found in by_slot.items() if kind in found.recalls}
        return {name: {"proponents": each.proponents, "opponents": each.opponents} for name, each in kept.items()}

    return {
        f"recall@{RECALL_K}": float(np.mean(list(least.values()))),
        "by_slot": least,  # of the sign and the kind of queries that are found worst
        "against": "a scan of every code",
        "queries": f"{RECALL_QUERIES} stored rows, each among the others, and {RECALL_QUERIES} random combinations of "
        f"{ROWS_OF_A_QUERY}",
        **approximation.to_dict(),
        "efforts": {slot_name(slot): found.effort for slot, found in by_slot.items()},
        HELD_OUT: of_kind(HELD_OUT),
        GIVEN: of_kind(GIVEN),
    }


def _held_out(slot: Slot) -> _Asked:
    """Stored rows by themselves, and random combinations; none of rows that are zero."""
    live, rng = np.flatnonzero(slot.norms), np.random.default_rng(0)
    if not len(live):
        return _Asked(queries=slot.rows(live), left_out=live)
    alone = rng.choice(live, min(RECALL_QUERIES, len(live)), replace=False)
    rows = rng.choice(live, (RECALL_QUERIES, ROWS_OF_A_QUERY))
    decoded = slot.rows(rows.ravel()).reshape(*rows.shape, -1)  # [M, rows, W]
    lengths = np.linalg.norm(decoded, axis=2, keepdims=True)
    weights = rng.standard_normal((*rows.shape, 1), dtype=np.float32) / np.maximum(lengths, 1e-30)
    return _Asked(
        queries=np.concatenate([slot.rows(alone), (decoded * weights).sum(1)]),
        left_out=np.concatenate([alone, np.full(RECALL_QUERIES, -1)]),
    )


def _meeting(step: int | None, vectors: np.ndarray, num_steps: int) -> np.ndarray:
    """What meets a slot under any way to resolve, float32 [M, W]."""
    query_steps = vectors.shape[1] - 1
    ways: tuple[Resolve, ...] = ("query_step", "train_step")
    if query_steps == num_steps:
        ways = (*ways, "same_step")
    met = {pair.query for way in ways for pair in pairs(way, num_steps, query_steps) if pair.slot == step}
    met |= {TOTAL} if step is None else set()
    return vectors[:, sorted(met)].reshape(-1, vectors.shape[2])


def _recall(slot: Slot, asked: _Asked, effort: int) -> Recall:
    answers = slot.search(asked.queries, RECALL_K + 1, effort=effort)
    shares = []
    for sign in (1, -1):
        hits = wanted = 0
        for left_out, exact, found in zip(asked.left_out, asked.exact, answers, strict=True):
            best, mine = (_strongest(answer, sign, left_out) for answer in (exact, found))
            hits += int((mine >= best.min(initial=np.inf) * (1 - 1e-6)).sum())  # equal scores count as found
            wanted += len(best)
        shares.append(hits / wanted if wanted else 1.0)
    return Recall(proponents=shares[0], opponents=shares[1])


def _strongest(answer: _Answer, sign: int, left_out: int) -> np.ndarray:
    """Sizes of the k strongest influences of a sign, the strongest first."""
    rows, scores = answer
    sizes = sign * scores[rows != left_out]
    return -np.sort(-sizes[sizes > 0])[:RECALL_K]


def _refusal(slot: Slot, approximation: Approximation, found: Measured) -> str:
    kind, recall = min(found.recalls.items(), key=lambda each: each[1].least)
    sign, share = min(("proponents", recall.proponents), ("opponents", recall.opponents), key=lambda each: each[1])
    factory = "the default FAISS index" if approximation.factory is None else f"FAISS factory {approximation.factory!r}"
    where = "the total" if slot.step is None else f"step {slot.step}"
    return (
        f"{factory} finds {share:.3f} of the {RECALL_K} strongest {sign} of {where}, on {kind.replace('_', '-')} "
        f"queries at full effort ({found.effort}); the recall floor is {approximation.recall_floor}. Nothing is "
        "published and all sketches are kept: run the same command with a finer factory (--faiss 'SQ8', or none) or a "
        "lower --recall-floor; additions and compactions keep those of their index, which is then to be built anew"
    )
