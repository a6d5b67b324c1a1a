"""Trains the Sudoku task's looped transformer and records the run: puzzles, checkpoints, and `training.json` last.

Every puzzle takes the same number of loops; its loss is that after the last, and the backward pass goes through all.
Knows nothing of attribution.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from loopsway.indexer.progress import BuildProgress

from .saved_run import CheckpointWriter, SavedRun
from .sudoku_boards import Board
from .sudoku_model import SudokuTransformer
from .sudoku_puzzles import Puzzle, draw_puzzles, write_puzzles

PUZZLES = "puzzles.jsonl"
WARMUP = 0.05  # of the steps


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; the defaults are for 6 x 6 boards and minutes on two cores.

    Attributes:
        box_rows, box_columns: of the board.
        num_puzzles: drawn; an eighth of them, about, is held out.
        width, num_heads, num_loops: of the model.
        batch_size: puzzles a step.
        num_steps: of AdamW, over which the learning rate falls as a cosine, after a short warmup.
        learning_rate, weight_decay: of AdamW.
    """

    box_rows: int = 2
    box_columns: int = 3
    num_puzzles: int = 6000
    width: int = 64
    num_heads: int = 4
    num_loops: int = 8
    batch_size: int = 32
    num_steps: int = 1200
    learning_rate: float = 2e-3
    weight_decay: float = 0.1

    @property
    def board(self) -> Board:
        return Board(self.box_rows, self.box_columns)

    def model(self) -> dict[str, int]:
        """The arguments that rebuild the model."""
        names = ("box_rows", "box_columns", "width", "num_heads", "num_loops")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class SudokuRun(SavedRun):
    """A finished training.

    Attributes:
        recipe: that it followed.
        held_out_accuracy: share of the held-out boards that are right in every cell.
    """

    recipe: Recipe
    held_out_accuracy: float

    @classmethod
    def _from_json(cls, record: dict[str, Any]) -> dict[str, Any]:
        return {**record, "recipe": Recipe(**record["recipe"])}


def train(run: str | Path, recipe: Recipe, *, seed: int = 0, progress: bool = True, device: str = "cpu") -> SudokuRun:
    """Draws puzzles, trains on those that are not held out, and leaves a finished run in the folder.

    Two checkpoints are kept, after three quarters of the steps and after all.
    """
    writer, start = CheckpointWriter(run), time.perf_counter()
    puzzles = draw_puzzles(recipe.board, seed, recipe.num_puzzles)
    write_puzzles(Path(run) / PUZZLES, puzzles)
    training = [puzzle for puzzle in puzzles if not puzzle.is_held_out]
    held_out = [puzzle for puzzle in puzzles if puzzle.is_held_out]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SudokuTransformer(**recipe.model()).to(device)
    tokens, answers = (part.to(device) for part in encode(training))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=recipe.weight_decay, betas=(0.9, 0.98))
    draw = torch.Generator().manual_seed(seed)
    with BuildProgress(shown=progress) as bars:
        bars.begin("training Sudoku", recipe.num_steps)
        for step in range(recipe.num_steps):
            rate = _learning_rate(recipe, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            rows = torch.randint(len(training), [recipe.batch_size], generator=draw).to(device)
            optimizer.zero_grad()
            losses(model, tokens[rows], answers[rows]).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            bars.advance(1)
            if step + 1 in (recipe.num_steps * 3 // 4, recipe.num_steps):
                writer.write(model, step=step + 1, learning_rate=rate)
    accuracy = float(are_solved(model.cpu(), held_out).float().mean()) if held_out else math.nan
    seconds = round(time.perf_counter() - start, 1)
    report = SudokuRun(
        run=str(run),
        recipe=recipe,
        seed=seed,
        seconds=seconds,
        saved=tuple(writer.saved),
        held_out_accuracy=accuracy,
    )
    report.write()
    return report


def encode(puzzles: Sequence[Puzzle]) -> tuple[torch.Tensor, torch.Tensor]:
    """Digits of the puzzles, 0 for an empty cell, and of their solutions from 0; int64 [B, C] each."""
    tokens = torch.tensor([list(map(int, puzzle.puzzle)) for puzzle in puzzles])
    return tokens, torch.tensor([[int(digit) - 1 for digit in puzzle.solution] for puzzle in puzzles])


def losses(model: torch.nn.Module, tokens: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Each puzzle's mean cross-entropy over its empty cells, [B]."""
    empty = tokens == 0
    each = functional.cross_entropy(model(tokens).transpose(1, 2), answers, reduction="none") * empty  # [B, C]
    return each.sum(1) / empty.sum(1).clamp(min=1)


@torch.no_grad()
def are_solved(model: SudokuTransformer, puzzles: Sequence[Puzzle], num_loops: int | None = None) -> torch.Tensor:
    """Whether every empty cell is right after each loop, bool [L, B]; with num_loops=None after the last alone, [B]."""
    tokens, answers = encode(puzzles)
    states = model.states(tokens, num_loops)
    right = [((model.read_out(state).argmax(2) == answers) | (tokens > 0)).all(1) for state in states]
    return right[-1] if num_loops is None else torch.stack(right)


def _learning_rate(recipe: Recipe, step: int) -> float:
    warmup = max(1, round(WARMUP * recipe.num_steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, recipe.num_steps - warmup)
    return recipe.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)
