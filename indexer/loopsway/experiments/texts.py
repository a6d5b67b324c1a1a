"""Texts to measure and train on: GSM8K's (Cobbe et al. 2021, arXiv 2110.14168), or sums in words, made up here.

GSM8K is not shipped: the environment variable LOOPSWAY_GSM8K names a folder with gsm8k_train.jsonl and
gsm8k_test.jsonl. A text is a question, a line break, and the answer.
"""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

DATA_VARIABLE = "LOOPSWAY_GSM8K"
SOURCE = "github.com/openai/grade-school-math has its train.jsonl and test.jsonl"


def texts_at_hand(count: int) -> tuple[list[str], str]:
    """Texts, and what they are."""
    folder = gsm8k_folder()
    if folder is None:
        return synthetic_texts(count), f"sums in words: {DATA_VARIABLE} names no folder of GSM8K"
    return gsm8k_texts(folder, count), "GSM8K"


def gsm8k_folder() -> Path | None:
    folder = os.environ.get(DATA_VARIABLE)
    return Path(folder) if folder else None


def gsm8k_texts(folder: Path, count: int, split: str = "train") -> list[str]:
    """Questions with their answers, of the split "train" or "test".

    Raises:
        FileNotFoundError: the folder has no such file.
    """
    file = folder / f"gsm8k_{split}.jsonl"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; set {DATA_VARIABLE} to the folder of {file.name} ({SOURCE})")
    with file.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    return [f"{record['question']}\n{record['answer']}" for record in records]


def question(text: str) -> str:
    """Without the answer. No question of GSM8K has a line break."""
    return text.partition("\n")[0]


def synthetic_texts(count: int) -> list[str]:
    draw = random.Random(0)
    texts = []
    for _ in range(count):
        name, thing = draw.choice(["Ada", "Emmy", "Sofia", "Mary"]), draw.choice(["apples", "books", "marbles"])
        first, second = draw.randrange(2, 99), draw.randrange(2, 99)
        texts.append(
            f"{name} has {first} {thing} and finds {second} more. How many {thing} has {name} now?\n"
            f"{first} + {second} = {first + second} {thing}."
        )
    return texts
