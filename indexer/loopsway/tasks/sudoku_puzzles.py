"""Sudoku puzzles with one solution each, drawn from a seed at graded difficulty, and the file they are kept in."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from loopsway.indexer.store.files import write_whole

from .sudoku_boards import GRADES, Board, Search, judge

HELD_OUT_FRACTION = 8  # one solved board in so many, with all of its puzzles


@dataclass(frozen=True, kw_only=True)
class Puzzle:
    """One of a data set.

    Attributes:
        puzzle, solution: row by row, "0" for an empty cell.
        grade: how hard it is, one of GRADES.
        guesses: of the solver that proved the solution unique.
        is_held_out: whether training never sees it, nor any puzzle with its solution.
    """

    puzzle: str
    solution: str
    grade: str
    guesses: int
    is_held_out: bool

    @property
    def clues(self) -> int:
        return len(self.puzzle) - self.puzzle.count("0")

    @property
    def difficulty(self) -> tuple[int, int, int]:
        """Compares as hard as a solver found it: by grade, then guesses, then empty cells."""
        return GRADES.index(self.grade), self.guesses, -self.clues


def draw_puzzles(board: Board, seed: int, count: int) -> list[Puzzle]:
    """Different puzzles, drawn from a seed.

    Raises:
        ValueError: so many were not found: the board is too small.
    """
    found: dict[str, Puzzle] = {}
    draw = random.Random(seed)
    for _ in range(20 * count):
        if len(found) == count:
            return list(found.values())
        puzzle = _draw(board, draw)
        found.setdefault(puzzle.puzzle, puzzle)
    raise ValueError(f"{20 * count} draws gave {len(found)} different puzzles, not {count}; ask for fewer")


def _draw(board: Board, draw: random.Random) -> Puzzle:
    """A solved board, from which clues are taken in random order while the solution stays the only one.

    Where that stops is random too, between the fewest clues and a third of the board more: grades from easy to hard.
    """
    solution = _solved(board, draw)
    cells, spare = list(solution), draw.randrange(1 + board.num_cells // 3)
    removed: list[int] = []
    for cell in draw.sample(range(board.num_cells), board.num_cells):
        cells[cell] = "0"
        if next(_others(board, "".join(cells), solution), None) is None:
            removed.append(cell)
        else:
            cells[cell] = solution[cell]
    for cell in draw.sample(removed, min(spare, len(removed))):
        cells[cell] = solution[cell]
    puzzle = "".join(cells)
    verdict = judge(board, puzzle)
    assert verdict.solution == solution
    return Puzzle(
        puzzle=puzzle,
        solution=solution,
        grade=verdict.grade,
        guesses=verdict.guesses,
        is_held_out=zlib.crc32(solution.encode()) % HELD_OUT_FRACTION == 0,
    )


def _solved(board: Board, draw: random.Random) -> str:
    order = draw.sample(range(board.side), board.side)
    first = "".join(str(1 + digit) for digit in draw.sample(range(board.side), board.side))
    cells = list(first.ljust(board.num_cells, "0"))
    for cell in draw.sample(range(board.side, board.num_cells), board.side // 2):  # so that boards differ further down
        digit = str(1 + draw.randrange(board.side))
        before, cells[cell] = cells[cell], digit
        if next(Search(board, order).solutions("".join(cells)), None) is None:
            cells[cell] = before
    return next(Search(board, order).solutions("".join(cells)))


def _others(board: Board, puzzle: str, solution: str) -> Iterator[str]:
    return (other for other in Search(board).solutions(puzzle) if other != solution)


def write_puzzles(path: Path, puzzles: list[Puzzle]) -> None:
    """Writes them as JSON, one on a line."""
    write_whole(path, "".join(json.dumps(asdict(puzzle)) + "\n" for puzzle in puzzles).encode())


def read_puzzles(path: Path) -> list[Puzzle]:
    """Reads what `write_puzzles` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    try:
        return [Puzzle(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
