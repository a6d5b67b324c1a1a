"""Retrains on a part of the rows and keeps each outcome as a file: what is done is never done again.

M subsets, N training examples, Q queries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np

from .subject import Subject
from .training import query_losses, train

FACTS = "subject.json"
SUBSET_SEED = 0


class Retraining(Protocol):
    """Gives the losses [Q] of the queries under a model trained on the kept rows, bool [N], from a seed."""

    def __call__(self, kept: np.ndarray, seed: int) -> np.ndarray: ...


class KeptRetraining:
    """Retrains a subject; outcomes are kept in a folder.

    Args:
        subject: what.
        folder: its own: outcomes of another subject or course there are refused.
        done: called after each training that was asked for.

    Raises:
        ValueError: the folder holds those of another.
    """

    def __init__(self, subject: Subject, folder: Path, done: Callable[[], None] = lambda: None) -> None:
        self._subject, self._folder, self._done = subject, folder, done
        folder.mkdir(parents=True, exist_ok=True)
        facts, file = subject.facts(), folder / FACTS
        if not file.exists():
            file.write_text(json.dumps(facts), encoding="utf-8")
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept != json.loads(json.dumps(facts)):
            raise ValueError(f"{folder} holds trainings of {kept}, asked for is {facts}: choose another folder")

    def __call__(self, kept: np.ndarray, seed: int) -> np.ndarray:
        digest = hashlib.sha256(np.packbits(kept).tobytes()).hexdigest()[:20]
        file = self._folder / f"{seed}-{digest}.npy"
        if not file.exists():
            losses = query_losses(self._subject, train(self._subject, self._subject.rows, kept, seed))
            partial = file.with_suffix(".partial")
            with partial.open("wb") as stream:
                np.save(stream, losses)
            partial.replace(file)
        self._done()
        return np.load(file)


def halves(num_rows: int, count: int) -> np.ndarray:
    """Random halves of the rows, bool [M, N]: the same for every seed of the training."""
    draw, subsets = np.random.default_rng(SUBSET_SEED), np.zeros((count, num_rows), bool)
    for subset in subsets:
        subset[draw.permutation(num_rows)[: num_rows // 2]] = True
    return subsets
