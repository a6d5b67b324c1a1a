"""A looped GPT on made-up sums, as a server or a build names it."""

from __future__ import annotations

from typing import Any

from loopsway.experiments.looped_gpt import GPTTask, Shape
from loopsway.experiments.texts import synthetic_texts


class ServedGPT(GPTTask):
    """Trained for three steps.

    Args:
        dim: of the model.
        count: examples.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(Shape(dim=dim), synthetic_texts(count), training_steps=3)

    def example_from_json(self, obj: Any) -> str:
        if not isinstance(obj, dict) or not isinstance(obj.get("text"), str):
            raise ValueError(f"expected an object with a text, this is a {type(obj).__name__}")
        return obj["text"]

    def example_id(self, row: int) -> str:
        return f"sum-{row}"

    def describe(self, row: int) -> str:
        return self._texts[row]
