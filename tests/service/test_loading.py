"""Which task's code runs is decided by whoever serves, and a model that doesn't fit the index is refused."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from loopsway.indexer import Checkpoint, IndexNotFoundError, SketchConfig, build_index, load_task, open_index
from loopsway.indexer.sketches.weights import size_of
from loopsway.indexer.store.folders import LocalFolder
from loopsway.indexer.store.sealed import read_sealed, write_sealed
from loopsway.service import IndexSettings, LoadError, Settings
from loopsway.service.loading import load_engine
from loopsway.service.worker import ModelWorker
from serving import CONFIG, TASK_SPEC


@pytest.fixture
async def worker() -> AsyncIterator[ModelWorker]:
    worker = ModelWorker(Settings())
    yield worker
    await worker.stop()


async def load(worker: ModelWorker, path: Path, task: str, task_arguments: dict[str, Any] | None = None) -> None:
    """As a server does at its start."""
    engine = load_engine(IndexSettings(path=str(path), task=task, task_arguments=task_arguments))
    try:
        await engine.warm_up(worker)
    finally:
        await asyncio.to_thread(engine.close)


def test_the_task_that_an_index_names_does_not_run_unasked(index_path: Path) -> None:
    with pytest.raises(LoadError, match=r"names the task .*tiny_task.py:TinyTask, which is not one of Loopsway's own"):
        load_engine(IndexSettings(path=str(index_path)))


def test_a_path_that_poses_as_a_shipped_task_does_not_run(index_path: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(index_path, tmp_path / "posing.index")
    manifest = read_sealed(LocalFolder(copy), "manifest.json")
    manifest["parts"][0]["plan"]["task_spec"] = f"loopsway.tasks./../{TASK_SPEC}"
    write_sealed(LocalFolder(copy), "manifest.json", manifest)
    with pytest.raises(LoadError, match="not one of Loopsway's own"):
        load_engine(IndexSettings(path=str(copy)))


def test_a_task_named_by_hand_runs(index_path: Path) -> None:
    engine = load_engine(IndexSettings(path=str(index_path), task=TASK_SPEC))
    assert engine.accepts_examples
    engine.close()


def test_without_its_model_an_index_runs_no_task(index_path: Path) -> None:
    engine = load_engine(IndexSettings(path=str(index_path), model=False))
    assert not engine.accepts_examples
    engine.close()
    with pytest.raises(LoadError, match="drop one"):
        load_engine(IndexSettings(path=str(index_path), task=TASK_SPEC, model=False))


def test_an_index_is_opened_on_the_device_that_its_model_is_on(index_path: Path) -> None:
    with pytest.raises(ValueError, match="device 'gpu' can't be used"):
        load_engine(IndexSettings(path=str(index_path), model=False, device="gpu"))


async def test_each_model_runs_on_the_device_of_its_own_index(
    index_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """One device by two names, for which one budget holds: it suffices for one of the four checkpoints."""
    budget = size_of(load_task(TASK_SPEC).model(Checkpoint(name="early", learning_rate=0.1)))
    worker, devices = ModelWorker(Settings(model_bytes=budget)), ("cpu", "cpu:0")
    engines = [
        load_engine(IndexSettings(path=str(index_path), name=f"on {device}", task=TASK_SPEC, device=device))
        for device in devices
    ]
    try:
        for engine in engines:
            await engine.warm_up(worker)
        assert worker.held == (1, budget)
    finally:
        await worker.stop()
        for engine in engines:
            await asyncio.to_thread(engine.close)
    log = capfd.readouterr().err
    for device in devices:
        assert f"the model of index on {device} runs on device {device}\n" in log


def test_an_index_that_names_no_task_asks_for_one(tmp_path: Path) -> None:
    build_index(load_task(TASK_SPEC), tmp_path / "nameless.index", CONFIG, progress=False)
    with pytest.raises(LoadError, match="names no task: give --task"):
        load_engine(IndexSettings(path=str(tmp_path / "nameless.index")))


async def test_a_model_of_other_checkpoints_is_refused_naming_both_fingerprints(
    index_path: Path, worker: ModelWorker
) -> None:
    with pytest.raises(LoadError, match="other checkpoints") as caught:
        await load(worker, index_path, TASK_SPEC, {"learning_rate": 0.2})
    assert str(caught.value).count("fingerprint") == 1
    assert open_index(index_path).fingerprint in str(caught.value)
    await load(worker, index_path, TASK_SPEC, {"learning_rate": 0.1})
    with pytest.raises(LoadError, match="does not take the arguments"):
        await load(worker, index_path, TASK_SPEC, {"unheard": 1})
    assert worker.num_starts == 1


FROM_FILE = """
from safetensors.torch import load_file
from loopsway.indexer import Checkpoint, load_task
Tiny = type(load_task({spec!r}))
class FromFile(Tiny):
    def checkpoints(self):
        return [Checkpoint(name="only", learning_rate=0.1, path={weights!r})]
    def model(self, checkpoint):
        model = super().model(checkpoint)
        model.load_state_dict(load_file(checkpoint.path))
        return model
"""


async def test_weights_that_changed_since_the_build_are_refused(tmp_path: Path, worker: ModelWorker) -> None:
    weights, task_file = tmp_path / "only.safetensors", tmp_path / "from_file.py"
    task_file.write_text(FROM_FILE.format(spec=TASK_SPEC, weights=str(weights)))
    model = load_task(TASK_SPEC).model(Checkpoint(name="only", learning_rate=0.1))
    save_file(model.state_dict(), weights)
    path, spec = tmp_path / "tiny.index", f"{task_file}:FromFile"
    build_index(load_task(spec), path, CONFIG, progress=False)
    await load(worker, path, spec)
    save_file({name: value + 1 for name, value in model.state_dict().items()}, weights)
    with pytest.raises(LoadError, match=r"weights of checkpoint only of task .* are not those"):
        await load(worker, path, spec)


async def test_the_arguments_of_the_build_are_used_again(tmp_path: Path, worker: ModelWorker) -> None:
    arguments = {"learning_rate": 0.3}
    task = load_task(TASK_SPEC, arguments)
    path = tmp_path / "tiny.index"
    build_index(task, path, SketchConfig(width=64), task_spec=TASK_SPEC, task_arguments=arguments, progress=False)
    await load(worker, path, TASK_SPEC)


def test_no_index_is_a_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(IndexNotFoundError):
        load_engine(IndexSettings(path=str(tmp_path / "none.index")))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"port": 65536}, "port is 65536, expected less than or equal to 65535"),
        ({"max_k": 0}, "max_k is 0, expected greater than 0"),
        ({"max_waiting": -1}, "max_waiting is -1, expected greater than or equal to 0"),
        ({"grace_s": -0.5}, "grace_s is -0.5, expected greater than or equal to 0"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def test_an_index_that_one_process_reads_needs_no_ray(index_path: Path) -> None:
    program = (
        "import sys; from loopsway.service import IndexSettings; from loopsway.service.loading import load_engine;"
        f"load_engine(IndexSettings(path={str(index_path)!r}, model=False)).close(); sys.exit('ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
