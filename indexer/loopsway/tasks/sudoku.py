"""Sudoku, solved by a looped transformer, as a Task.

The examples are the training puzzles of a run of `sudoku_training`, in the order in which they were drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from loopsway.indexer.config import Checkpoint, Loop
from loopsway.indexer.task import Task, TaskError

from .sudoku_boards import judge
from .sudoku_model import SudokuTransformer
from .sudoku_puzzles import Puzzle, read_puzzles
from .sudoku_training import PUZZLES, SudokuRun, encode, losses


class SudokuTask(Task):
    """An example is a puzzle with its only solution; its loss is the mean over its empty cells.

    Args:
        run: the folder that a training wrote.
        num_loops: to answer with; None: as many as in training.
    """

    loop = Loop(body=["block"])

    def __init__(self, run: str, num_loops: int | None = None) -> None:
        self.run, self._num_loops = run, num_loops

    def checkpoints(self) -> Sequence[Checkpoint]:
        return self._training.checkpoints

    def model(self, checkpoint: Checkpoint) -> SudokuTransformer:
        if checkpoint.path is None:
            raise TaskError(f"checkpoint {checkpoint.name!r} has no path; take it from SudokuTask.checkpoints()")
        model = SudokuTransformer(**self._training.recipe.model())
        model.load_state_dict(load_file(checkpoint.path))
        if self._num_loops is not None:
            model.num_loops = self._num_loops
        return model.eval()

    def examples(self) -> Sequence[Puzzle]:
        return self._examples

    def held_out(self) -> list[Puzzle]:
        return [puzzle for puzzle in self._puzzles if puzzle.is_held_out]

    def collate(self, examples: Sequence[Puzzle]) -> dict[str, torch.Tensor]:
        tokens, answers = encode(examples)
        return {"tokens": tokens, "answers": answers}

    def losses(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return losses(model, batch["tokens"], batch["answers"])

    def example_from_json(self, obj: Any) -> Puzzle:
        """The puzzle of `{"puzzle": "4001..."}`, whose solution is found here and must be the only one."""
        if not isinstance(obj, dict) or set(obj) != {"puzzle"} or not isinstance(obj["puzzle"], str):
            raise ValueError('a Sudoku example is an object with the one key "puzzle", a string of digits, 0 for empty')
        board, text = self._training.recipe.board, obj["puzzle"]
        board.check(text)
        if "0" not in text:
            raise ValueError("the puzzle has no empty cell, so there is nothing to answer; put 0 where it is to be")
        verdict = judge(board, text)
        if verdict.solution is None:
            raise ValueError(f"the puzzle {text} has no solution, or more than one; expected exactly one")
        return Puzzle(
            puzzle=text, solution=verdict.solution, grade=verdict.grade, guesses=verdict.guesses, is_held_out=False
        )

    def example_id(self, row: int) -> str:
        return self._examples[row].puzzle

    def metadata(self, row: int) -> dict[str, Any]:
        puzzle = self._examples[row]
        return {"clues": puzzle.clues, "grade": puzzle.grade, "guesses": puzzle.guesses, "solution": puzzle.solution}

    def describe(self, row: int) -> str:
        puzzle = self._examples[row]
        return f"{puzzle.puzzle} -> {puzzle.solution}"

    @cached_property
    def _training(self) -> SudokuRun:
        try:
            return SudokuRun.read(self.run)
        except (OSError, ValueError) as error:
            raise TaskError(f"{error}; run `loopsway reproduce fig2`, whose folder has one in work/") from error

    @cached_property
    def _puzzles(self) -> list[Puzzle]:
        return read_puzzles(Path(self.run) / PUZZLES)

    @cached_property
    def _examples(self) -> list[Puzzle]:
        return [puzzle for puzzle in self._puzzles if not puzzle.is_held_out]
