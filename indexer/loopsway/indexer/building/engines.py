"""Who sketches the blocks of a build: this process, or others that `Engine` stands for."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from ..store.generation import Generation
from .blocks import BlockSketcher


class Engine(Protocol):
    """Sketches blocks and stores them.

    Attributes:
        title: of the work, for people.
    """

    title: str

    def run(self, generation: Generation, blocks: Sequence[int], on_examples: Callable[[int], None]) -> Generator[int]:
        """Yields each block once it is stored, in any order. Closed early, it stops.

        Args:
            generation: with its arrays made.
            blocks: to sketch.
            on_examples: called with the number of examples that were sketched, as they are.
        """
        ...


class LocalEngine:
    """Sketches in this process, one block after another."""

    title = "sketching examples"

    def __init__(self, blocks: BlockSketcher) -> None:
        self._blocks = blocks

    def run(self, generation: Generation, blocks: Sequence[int], on_examples: Callable[[int], None]) -> Generator[int]:
        for block in blocks:
            generation.write(block, self._blocks.coded(generation.plan, block, on_examples))
            yield block
