"""Next-byte prediction on the beginnings of school questions, by a tiny looped language model.

The questions are GSM8K's where its folder is named (`texts.py`); else of sums in words, made up.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict

from torch import Tensor, nn

from ..looped_gpt import LoopedGPT, Shape, byte_rows, next_byte_losses
from ..texts import DATA_VARIABLE, gsm8k_folder, gsm8k_texts, question, synthetic_texts
from .subject import Course, Subject

NUM_ROWS, NUM_QUERIES = 200, 12
TINY = Course(num_steps=4, batch_size=16, learning_rate=3e-3, weight_decay=0.1, num_checkpoints=2)
SMALL = Course(num_steps=120, batch_size=32, learning_rate=3e-3, weight_decay=0.1, num_checkpoints=6)
TINY_SHAPE, SMALL_SHAPE = (
    Shape(dim=dim, num_steps=num_steps, num_bytes=num_bytes, head_dim=16, mlp_factor=2, starts_empty=True)
    for dim, num_steps, num_bytes in ((16, 2, 16), (32, 4, 48))
)


class ByteSubject(Subject):
    """Texts, byte by byte; a wrong label is a text that is read backwards.

    Args:
        name: for people.
        course: of the training.
        shape: of the model.
        rows: training texts.
        queries: texts that are in no training.
    """

    body = ("block",)

    def __init__(self, name: str, course: Course, shape: Shape, rows: Sequence[str], queries: Sequence[str]) -> None:
        self.name, self.course, self.rows, self.queries = name, course, rows, queries
        self._shape = shape

    def new_model(self) -> nn.Module:
        return LoopedGPT(self._shape)

    def collate(self, examples: Sequence[str]) -> Tensor:
        """Bytes [B, T + 1]."""
        return byte_rows(examples, self._shape.num_bytes)

    def losses(self, model: nn.Module, batch: Tensor) -> Tensor:
        return next_byte_losses(model, batch)

    def mislabelled(self, example: str) -> str:
        return example[: self._shape.num_bytes][::-1]

    def facts(self) -> dict[str, object]:
        texts = hashlib.sha256("\0".join([*self.rows, *self.queries]).encode()).hexdigest()[:16]
        return {"subject": self.name, "course": asdict(self.course), "model": asdict(self._shape), "texts": texts}


class TextSubject(ByteSubject):
    """Questions of up to 48 bytes.

    Args:
        tiny: a model and a training for tests, which learn nothing.
    """

    def __init__(self, *, tiny: bool = False) -> None:
        if folder := gsm8k_folder():
            name, rows = "text (GSM8K)", gsm8k_texts(folder, NUM_ROWS)
            queries = gsm8k_texts(folder, NUM_QUERIES, "test")
        else:
            name, made_up = (
                f"text (sums in words: {DATA_VARIABLE} names no folder)",
                synthetic_texts(NUM_ROWS + NUM_QUERIES),
            )
            rows, queries = made_up[:NUM_ROWS], made_up[NUM_ROWS:]
        rows, queries = ([question(text) for text in each] for each in (rows, queries))
        super().__init__(name, TINY if tiny else SMALL, TINY_SHAPE if tiny else SMALL_SHAPE, rows, queries)
