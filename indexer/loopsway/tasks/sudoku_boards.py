"""Sudoku boards of any size, and a solver that proves that a puzzle has one solution and grades it.

A board's puzzle is a string, row by row: a digit for each cell, "0" for an empty one. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

GRADES = ("easy", "medium", "hard")


@dataclass(frozen=True)
class Board:
    """Boxes of so many rows and columns, and as many of them as make a square: 3 and 3 is the usual 9 x 9.

    Args:
        box_rows, box_columns: of a box; their product, at most 9, is the board's side and its number of digits.
    """

    box_rows: int = 3
    box_columns: int = 3

    def __post_init__(self) -> None:
        if min(self.box_rows, self.box_columns) < 1 or not 2 <= self.side <= 9:
            raise ValueError(
                f"a box has {self.box_rows} rows and {self.box_columns} columns; expected 1 or more of each, and "
                "2 to 9 cells"
            )

    @property
    def side(self) -> int:
        return self.box_rows * self.box_columns

    @property
    def num_cells(self) -> int:
        return self.side**2

    def places(self, cell: int) -> tuple[int, int, int]:
        """The cell's row, column and box."""
        row, column = divmod(cell, self.side)
        return row, column, row // self.box_rows * self.box_rows + column // self.box_columns

    @cached_property
    def units(self) -> list[list[int]]:
        """The cells of each row, column and box."""
        units: list[list[int]] = [[] for _ in range(3 * self.side)]
        for cell in range(self.num_cells):
            for kind, place in enumerate(self.places(cell)):
                units[kind * self.side + place].append(cell)
        return units

    @cached_property
    def peers(self) -> list[list[int]]:
        """The other cells of each cell's three units."""
        together: list[set[int]] = [set() for _ in range(self.num_cells)]
        for unit in self.units:
            for cell in unit:
                together[cell].update(unit)
        return [sorted(cells - {cell}) for cell, cells in enumerate(together)]

    def check(self, puzzle: str) -> None:
        """Refuses what is no puzzle of this board, with ValueError."""
        digits = "".join(map(str, range(self.side + 1)))
        if len(puzzle) != self.num_cells or not set(puzzle) <= set(digits):
            raise ValueError(
                f"a puzzle of this board has {self.num_cells} characters from {digits}, 0 for an empty cell; got "
                f"{len(puzzle)} characters: {puzzle[:100]!r}"
            )


class Candidates:
    """What each cell can still be, as bits: the state of a solver."""

    def __init__(self, board: Board, puzzle: str) -> None:
        self.board = board
        every = (1 << board.side) - 1
        self.cells = [1 << (int(digit) - 1) if digit != "0" else every for digit in puzzle]
        self._spread = [False] * board.num_cells  # whether a cell's digit was taken from its peers

    def copy(self) -> Candidates:
        twin = Candidates.__new__(Candidates)
        twin.board, twin.cells, twin._spread = self.board, list(self.cells), list(self._spread)
        return twin

    @property
    def is_possible(self) -> bool:
        """Whether no cell has run out of candidates."""
        return all(self.cells)

    @property
    def is_solved(self) -> bool:
        return all(self._spread) and self.is_possible

    def reduce(self, *, hidden: bool) -> None:
        """Takes digits from cells as long as a rule applies.

        Naked singles: the digit of a cell that can be nothing else is none of its peers'. Hidden singles, if wanted:
        a cell that alone in a unit can have a digit has it.
        """
        while self.is_possible and (self._naked() or (hidden and self._hidden())):
            pass

    def _naked(self) -> bool:
        found = False
        for cell, bits in enumerate(self.cells):
            if not self._spread[cell] and bits and not bits & (bits - 1):
                self._spread[cell] = found = True
                for peer in self.board.peers[cell]:
                    self.cells[peer] &= ~bits
        return found

    def _hidden(self) -> bool:
        found = False
        for unit in self.board.units:
            once = twice = 0
            for cell in unit:
                twice |= once & self.cells[cell]
                once |= self.cells[cell]
            if once != (1 << self.board.side) - 1:  # a digit has no place left
                self.cells[unit[0]] = 0
                return False
            for cell in unit:
                single = self.cells[cell] & once & ~twice
                if single and single != self.cells[cell]:
                    self.cells[cell] = single if not single & (single - 1) else 0
                    found = True
        return found

    def __str__(self) -> str:
        return "".join(str(bits.bit_length()) if not bits & (bits - 1) else "0" for bits in self.cells)


@dataclass
class Search:
    """Solutions of a puzzle, found by singles and, where they end, by guesses in a cell with the fewest candidates.

    Attributes:
        guesses: made so far, wrong ones included.
    """

    board: Board
    order: Sequence[int] = field(default=(), repr=False)  # of the digits to guess; by default ascending
    guesses: int = 0

    def solutions(self, puzzle: str) -> Iterator[str]:
        self.board.check(puzzle)
        yield from self._from(Candidates(self.board, puzzle))

    def _from(self, state: Candidates) -> Iterator[str]:
        state.reduce(hidden=True)
        if not state.is_possible:
            return
        if state.is_solved:
            yield str(state)
            return
        _, cell = min((bits.bit_count(), cell) for cell, bits in enumerate(state.cells) if bits & (bits - 1))
        for digit in self.order or range(self.board.side):
            if state.cells[cell] >> digit & 1:
                self.guesses += 1
                guess = state.copy()
                guess.cells[cell] = 1 << digit
                yield from self._from(guess)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On a puzzle.

    Attributes:
        solution: the only one; None where there is none, or more than one.
        grade: "easy" where naked singles alone solve it, "medium" where hidden ones are needed, else "hard".
        guesses: that the search made until it had shown that there is no second solution.
    """

    solution: str | None
    grade: str
    guesses: int


def judge(board: Board, puzzle: str) -> Verdict:
    """Whether a puzzle has one solution, proved by a search for a second, and how hard it is."""
    search = Search(board)
    found = [solution for solution, _ in zip(search.solutions(puzzle), range(2), strict=False)]
    state = Candidates(board, puzzle)
    state.reduce(hidden=False)
    is_easy = state.is_solved
    grade = "hard" if search.guesses else "easy" if is_easy else "medium"
    return Verdict(solution=found[0] if len(found) == 1 else None, grade=grade, guesses=search.guesses)
