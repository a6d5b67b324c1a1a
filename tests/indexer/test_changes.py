"""A cut build is gone on with only by the code, data, weights and options that it was begun with."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from looped import LoopedTask
from loopsway.indexer import Checkpoint, IndexExistsError, SketchConfig, open_index

from .conftest import assert_same, build, contents

COUNT = 50

SOURCE = '''
from pathlib import Path
from safetensors.torch import load_file
from looped import InjectedModel, LoopedTask, make_model
from loopsway.indexer import Checkpoint

class FileTask(LoopedTask):
    """One checkpoint, whose weights are in a file."""

    folder: Path
    factor = 1.0

    def checkpoints(self):
        return [Checkpoint(name="last", learning_rate=0.1, path=str(self.folder / "last.safetensors"))]

    def model(self, checkpoint):
        model = make_model(InjectedModel)
        model.load_state_dict(load_file(checkpoint.path))
        return model

    def losses(self, model, batch):
        return self.factor * super().losses(model, batch)
'''


@pytest.fixture
def make_task(tmp_path: Path) -> Any:
    """Makes the task from its file, as it is at the time."""
    file = tmp_path / "file_task.py"
    file.write_text(SOURCE)
    save_weights(tmp_path)

    def make(**attributes: Any) -> Any:
        spec = importlib.util.spec_from_file_location("file_task", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["file_task"] = module
        spec.loader.exec_module(module)
        task = module.FileTask(count=COUNT)
        task.folder = tmp_path
        for name, value in attributes.items():
            setattr(task, name, value)
        return task

    yield make
    sys.modules.pop("file_task", None)


def save_weights(folder: Path, *, shift: float = 0.0) -> None:
    task = LoopedTask(count=1, num_checkpoints=1)
    state = task.model(task.checkpoints()[0]).state_dict()
    save_file({name: (value + shift).contiguous() for name, value in state.items()}, folder / "last.safetensors")


def begin(path: Path, task: Any) -> None:
    """Two blocks of four, then a Ctrl-C that can't wait."""
    losses = task.losses

    def interrupted(model: Any, batch: Any) -> Any:
        if len(list(path.glob("generations/*/blocks/*.json"))) == 2:
            raise KeyboardInterrupt
        return losses(model, batch)

    task.losses = interrupted
    with pytest.raises(KeyboardInterrupt):
        build(path, task)


def other_labels(task: Any) -> Any:
    task._examples = [*task._examples[:40], *task._examples[40:][::-1]]
    return task


CHANGES: dict[str, tuple[Any, str]] = {
    "code": (lambda make, folder: edited(make, folder), "task_code: [0-9a-f]{32} -> [0-9a-f]{32}"),
    "weights": (lambda make, folder: (save_weights(folder, shift=1e-4), make())[1], "checkpoint_digests: .*last"),
    "one example": (lambda make, folder: other_labels(make()), "examples_digest: [0-9a-f]{32} -> "),
    "an attribute that no file shows": (
        lambda make, folder: make(factor=1.5),
        r"begun with another model, other code or other libraries: the losses of its first examples were \[",
    ),
}


def edited(make: Any, folder: Path) -> Any:
    (folder / "file_task.py").write_text(SOURCE + "# another line\n")
    return make()


@pytest.mark.parametrize("change", CHANGES)
def test_a_cut_build_is_not_gone_on_with_after_a_change(make_task: Any, tmp_path: Path, change: str) -> None:
    path = tmp_path / "cut.index"
    begin(path, make_task())
    before, (changed, text) = contents(path), CHANGES[change]
    with pytest.raises(IndexExistsError, match=text):
        build(path, changed(make_task, tmp_path))
    assert_same(contents(path), before)


def test_without_a_change_it_goes_on(make_task: Any, tmp_path: Path) -> None:
    path = tmp_path / "cut.index"
    begin(path, make_task())
    build(path, make_task())
    build(tmp_path / "uncut.index", make_task())
    assert_same(contents(path), contents(tmp_path / "uncut.index"))


def test_a_finished_index_is_opened_whatever_became_of_the_code(make_task: Any, tmp_path: Path) -> None:
    path = tmp_path / "done.index"
    created = build(path, make_task()).created_at
    assert build(path, edited(make_task, tmp_path)).created_at == created
    with pytest.raises(IndexExistsError, match="examples_digest"):
        build(path, other_labels(make_task()))


def test_moved_weights_are_the_same_weights(make_task: Any, tmp_path: Path) -> None:
    path = tmp_path / "cut.index"
    begin(path, make_task())
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "last.safetensors").rename(tmp_path / "elsewhere" / "last.safetensors")
    assert build(path, make_task(folder=tmp_path / "elsewhere")).num_examples == COUNT


class BatchOfManyKinds(LoopedTask):
    """What collate gives may be of any structure: all of it counts as content."""

    last: Any = 0

    def collate(self, examples: Any) -> Any:
        return {**super().collate(examples), "more": (torch.tensor([self.last]), [self.last], {"deep": self.last})}


@pytest.mark.parametrize("place", [0, 1, 2])
def test_any_part_of_a_batch_is_content(tmp_path: Path, place: int) -> None:
    class Changed(BatchOfManyKinds):
        def collate(self, examples: Any) -> Any:
            batch = super().collate(examples)
            more = list(batch["more"])
            more[place] = (torch.tensor([1]), [1], {"deep": 1})[place]
            return {**batch, "more": tuple(more)}

    config = SketchConfig(width=64)
    path = tmp_path / "kinds.index"
    build(path, BatchOfManyKinds(count=4), config)
    with pytest.raises(IndexExistsError, match="examples_digest"):
        build(path, Changed(count=4), config)
    assert open_index(path).checkpoints[0] == Checkpoint(name="step-0", learning_rate=0.1)
