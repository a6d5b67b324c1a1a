"""Configurations are checked when they are made, and tasks when they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loopsway.indexer import Checkpoint, Loop, SketchConfig, TaskError, is_shipped, load_task


@pytest.mark.parametrize(
    ("kind", "arguments", "text"),
    [
        (Loop, {"body": []}, "expected one or more module names"),
        (Loop, {"body": ["a", ""]}, "expected one or more module names"),
        (SketchConfig, {"width": 1000}, "width is 1000, expected a power of two from 64"),
        (SketchConfig, {"width": 32}, "width is 32"),
        (SketchConfig, {"width": 1 << 21}, "width is 2097152"),
        (SketchConfig, {"bits": 3}, "bits is 3, expected one of 1, 2, 4, 8, 16, 32"),
        (SketchConfig, {"seed": -1}, "seed is -1"),
        (SketchConfig, {"layer_path": "magic"}, "layer_path is 'magic'"),
        (Checkpoint, {"name": "", "learning_rate": 1.0}, "name is empty"),
        (Checkpoint, {"name": "a", "learning_rate": 0.0}, "learning_rate 0.0, expected a number > 0"),
        (Checkpoint, {"name": "a", "learning_rate": float("nan")}, "learning_rate nan"),
    ],
)
def test_a_bad_value_is_named(kind: Any, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        kind(**arguments)


def test_a_string_is_no_list_of_modules() -> None:
    with pytest.raises(TypeError, match=r'write a list: body=\["block"\]'):
        Loop(body="block")


@pytest.mark.parametrize(
    "value",
    [
        Loop(body=["a", "b.*"], marker="a"),
        SketchConfig(width=256, bits=8, seed=9, layer_path="fourier"),
        SketchConfig(width=None),
        Checkpoint(name="last", learning_rate=0.5, path="run/last.safetensors"),
    ],
)
def test_a_configuration_survives_json(value: Any) -> None:
    assert type(value).from_dict(value.to_dict()) == value


TASK = """
from loopsway.indexer import Loop, Task
class Mine(Task):
    loop = Loop(body=["block"])
    def __init__(self, size: int = 3): self.size = size
    def checkpoints(self): return []
    def model(self, checkpoint): raise NotImplementedError
    def examples(self): return list(range(self.size))
    def collate(self, examples): return examples
    def losses(self, model, batch): raise NotImplementedError
NotATask = 3
"""


def test_a_task_is_loaded_from_a_file_by_name(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(TASK)
    assert len(load_task(f"{file}:Mine", {"size": 5}).examples()) == 5
    assert not is_shipped(f"{file}:Mine")
    assert is_shipped("loopsway.tasks.parity:ParityTask")
    assert not is_shipped("loopsway.tasks./../../evil.py:Task")


@pytest.mark.parametrize(
    ("spec", "arguments", "text"),
    [
        ("{file}", {}, "names no class; write path/to/file.py:ClassName"),
        ("{file}:Other", {}, "no class Other that derives from"),
        ("{file}:NotATask", {}, "no class NotATask"),
        ("{file}:Mine", {"depth": 1}, r"does not take the arguments \{'depth': 1\}"),
        ("nowhere.py:Mine", {}, "nowhere.py does not exist"),
        ("no.such.module:Mine", {}, "task module no.such.module can't be imported"),
    ],
)
def test_a_wrong_task_name_says_what_to_write(tmp_path: Path, spec: str, arguments: Any, text: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(TASK)
    with pytest.raises(TaskError, match=text):
        load_task(spec.format(file=file), arguments)
