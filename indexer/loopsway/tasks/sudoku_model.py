"""The looped transformer of the Sudoku task: one block over a board's cells, given the puzzle again at each step.

B puzzles, C cells, D the model's width.
"""

from __future__ import annotations

import torch
from torch import nn

from .parity_model import Block
from .sudoku_boards import Board


class SudokuTransformer(nn.Module):
    """Reads a puzzle and gives, for each cell, the logits of its digits.

    A cell is embedded as its digit, or none, its row, its column and its box.

    Args:
        box_rows, box_columns: of the board.
        width: D.
        num_heads: of the attention, which every cell has to every other.
        num_loops: how often the block is applied.
    """

    places: torch.Tensor

    def __init__(self, *, box_rows: int, box_columns: int, width: int, num_heads: int, num_loops: int) -> None:
        super().__init__()
        board = Board(box_rows, box_columns)
        self.num_loops = num_loops
        self.digits = nn.Embedding(1 + board.side, width)
        self.kinds = nn.ModuleList(nn.Embedding(board.side, width) for _ in range(3))
        self.block = Block(width, num_heads)
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, board.side)
        self.register_buffer("places", torch.tensor([board.places(cell) for cell in range(board.num_cells)]), False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.5)

    def forward(self, puzzles: torch.Tensor) -> torch.Tensor:
        """Logits [B, C, digits] of puzzles [B, C]."""
        return self.read_out(self.states(puzzles)[-1])

    def read_out(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.readout(self.norm(hidden))

    def states(self, puzzles: torch.Tensor, num_loops: int | None = None) -> list[torch.Tensor]:
        """The cells' hidden states after each loop, each [B, C, D]; of more or fewer loops than in training too."""
        injected = self.digits(puzzles)
        for axis, kind in enumerate(self.kinds):
            injected = injected + kind(self.places[:, axis])
        hidden, states = torch.zeros_like(injected), []
        for _ in range(self.num_loops if num_loops is None else num_loops):
            hidden = self.block(hidden + injected, None)
            states.append(hidden)
        return states
