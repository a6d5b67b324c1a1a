"""Sudoku puzzles have one solution each, the solver counts as a dumb one does, and the task is the run's."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

from loopsway.indexer import SketchConfig, StepSketcher
from loopsway.indexer.task import TaskError
from loopsway.tasks.saved_run import RECORD
from loopsway.tasks.sudoku import SudokuTask
from loopsway.tasks.sudoku_boards import Board, Search, judge
from loopsway.tasks.sudoku_puzzles import draw_puzzles
from loopsway.tasks.sudoku_training import PUZZLES, Recipe, SudokuRun, are_solved, train

SMALL = Board(2, 2)
RECIPE = Recipe(box_columns=2, num_puzzles=60, num_steps=8, width=16, num_loops=3, batch_size=8)
EASY = "003020600900305001001806400008102900700000008006708200002609500800203009005010300"
EASY_SOLVED = "483921657967345821251876493548132976729564138136798245372689514814253769695417382"


def all_solved_boards() -> list[str]:
    """Every 4 x 4 board, by trying every row."""
    rows = ["".join(row) for row in itertools.permutations("1234")]
    boards = ("".join(four) for four in itertools.product(rows, repeat=4))
    return [board for board in boards if is_solved(SMALL, board)]


def is_solved(board: Board, cells: str) -> bool:
    return all(len({cells[cell] for cell in unit}) == board.side for unit in board.units)


def test_the_search_finds_every_solution_and_no_other() -> None:
    boards, draw = all_solved_boards(), random.Random(0)
    assert len(boards) == 288  # a known number
    for _ in range(200):
        cells = list(draw.choice(boards))
        for cell in draw.sample(range(16), draw.randrange(6, 17)):
            cells[cell] = "0"
        if draw.random() < 0.3:  # often without any solution
            cells[draw.randrange(16)] = draw.choice("1234")
        puzzle = "".join(cells)
        expected = [
            board for board in boards if all(given in ("0", got) for given, got in zip(puzzle, board, strict=True))
        ]
        assert sorted(Search(SMALL).solutions(puzzle)) == expected, puzzle
        assert judge(SMALL, puzzle).solution == (expected[0] if len(expected) == 1 else None), puzzle


def test_a_known_puzzle_of_nine_by_nine_is_solved() -> None:
    verdict = judge(Board(), EASY)
    assert (verdict.solution, verdict.guesses) == (EASY_SOLVED, 0)


def test_grades_say_what_a_solver_needed() -> None:
    board, solution = Board(), EASY_SOLVED
    assert judge(board, "0" + solution[1:]).grade == "easy"
    ambiguous = judge(board, "0" * 81)
    assert ambiguous.solution is None
    assert ambiguous.grade == "hard"
    puzzles = draw_puzzles(Board(2, 3), seed=0, count=60)
    assert {puzzle.grade for puzzle in puzzles} >= {"easy", "medium"}
    assert all((puzzle.guesses > 0) == (puzzle.grade == "hard") for puzzle in puzzles)


@pytest.mark.parametrize(("board", "count"), [(SMALL, 300), (Board(2, 3), 40), (Board(), 3)])
def test_drawn_puzzles_have_one_solution_and_are_the_seeds(board: Board, count: int) -> None:
    puzzles = draw_puzzles(board, seed=3, count=count)
    assert puzzles == draw_puzzles(board, seed=3, count=count)
    assert len({puzzle.puzzle for puzzle in puzzles}) == count
    for puzzle in puzzles:
        assert list(Search(board).solutions(puzzle.puzzle)) == [puzzle.solution]
        assert is_solved(board, puzzle.solution)
    held_out = {puzzle.solution for puzzle in puzzles if puzzle.is_held_out}
    assert not held_out & {puzzle.solution for puzzle in puzzles if not puzzle.is_held_out}


def test_more_puzzles_than_a_board_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different puzzles, not 400; ask for fewer"):
        draw_puzzles(Board(1, 2), seed=0, count=400)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sudoku") / "run"
    train(folder, RECIPE, seed=1, progress=False)
    return folder


def test_a_run_is_read_as_it_was_written_and_is_the_seeds(run: Path, tmp_path: Path) -> None:
    report = SudokuRun.read(run)
    assert report.recipe == RECIPE
    again = train(tmp_path, RECIPE, seed=1, progress=False)
    assert again.held_out_accuracy == report.held_out_accuracy
    assert [(saved.step, saved.learning_rate > 0) for saved in report.saved] == [
        (RECIPE.num_steps * 3 // 4, True),
        (RECIPE.num_steps, True),
    ]
    for saved in report.saved:
        assert (tmp_path / saved.file).read_bytes() == (run / saved.file).read_bytes()


def test_the_task_has_the_runs_training_puzzles_and_sketches_them(run: Path) -> None:
    task = SudokuTask(str(run))
    puzzles, model = task.examples(), task.model(task.checkpoints()[-1])
    assert len(puzzles) + len(task.held_out()) == RECIPE.num_puzzles
    batch = task.collate(puzzles[:3])
    steps = StepSketcher(model, task.loop, SketchConfig(width=None)).sketch(task.losses, batch)
    assert steps.shape[:2] == (3, RECIPE.num_loops)
    own = torch.cat([task.losses(model, task.collate([puzzle])) for puzzle in puzzles[:3]])
    torch.testing.assert_close(task.losses(model, batch), own)
    assert are_solved(model, puzzles, 5).shape == (5, len(puzzles))
    assert SudokuTask(str(run), num_loops=5).model(task.checkpoints()[0]).num_loops == 5


def test_a_query_is_a_puzzle_with_one_solution(run: Path) -> None:
    task = SudokuTask(str(run))
    known = task.examples()[0]
    assert task.example_from_json({"puzzle": known.puzzle}).solution == known.solution
    for wrong, message in [
        ({"bits": "01"}, 'one key "puzzle"'),
        ({"puzzle": "0" * 16}, "no solution, or more than one"),
        ({"puzzle": "9" * 16}, "16 characters from 01234"),
        ({"puzzle": known.solution}, "no empty cell"),
    ]:
        with pytest.raises(ValueError, match=message):
            task.example_from_json(wrong)


def test_a_missing_or_damaged_run_says_what_to_do(run: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"training.json is missing; run `loopsway reproduce fig2`"):
        SudokuTask(str(tmp_path)).checkpoints()
    (tmp_path / RECORD).write_text("{}")
    with pytest.raises(TaskError, match=r"training.json is damaged"):
        SudokuTask(str(tmp_path)).checkpoints()
    (tmp_path / RECORD).write_bytes((run / RECORD).read_bytes())
    (tmp_path / PUZZLES).write_text("{\n")
    with pytest.raises(ValueError, match=r"puzzles.jsonl is damaged"):
        SudokuTask(str(tmp_path)).examples()
