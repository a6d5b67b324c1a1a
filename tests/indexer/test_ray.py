"""Real Ray, two workers: the same index as in one process, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cutting import BATCH_SIZE, BLOCK_ROWS, CONFIG
from loopsway.indexer import (
    Index,
    NonFiniteExampleError,
    add_examples,
    build_index,
    load_task,
    open_index,
    verify_index,
)
from loopsway.indexer.building.examples import SubsetTask

from .conftest import assert_same, contents

ray: Any = pytest.importorskip("ray", reason="Ray is not installed; pip install 'loopsway[ray]'")

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)

SPEC = f"{Path(__file__).with_name('ray_task.py')}:RayTask"


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def build(path: Path, **arguments: Any) -> Index:
    arguments = {"driver": os.getpid(), **arguments}
    return build_index(
        load_task(SPEC, arguments),
        path,
        CONFIG,
        task_spec=SPEC,
        task_arguments=arguments,
        block_rows=BLOCK_ROWS,
        batch_size=BATCH_SIZE,
        engine="ray",
        workers=2,
        progress=False,
    )


@pytest.mark.usefixtures("_cluster")
def test_the_index_is_that_of_one_process(whole_index: Path, tmp_path: Path) -> None:
    path = tmp_path / "ray.index"
    build(path)
    assert_same(contents(path), contents(whole_index))
    assert verify_index(path, progress=False) == []


@pytest.mark.usefixtures("_cluster")
def test_an_actor_that_is_killed_in_a_block_is_replaced(whole_index: Path, tmp_path: Path) -> None:
    path, marker = tmp_path / "ray.index", tmp_path / "marker"
    build(path, marker=str(marker))
    assert marker.exists()
    assert_same(contents(path), contents(whole_index))


@pytest.mark.usefixtures("_cluster")
def test_actors_add_what_is_new_of_a_file_that_has_grown(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"driver": os.getpid()}
    options: dict[str, Any] = {"block_rows": BLOCK_ROWS, "batch_size": BATCH_SIZE, "progress": False}
    engines: tuple[dict[str, Any], ...] = ({"engine": "local"}, {"engine": "ray", "workers": 2})
    grown = []
    for engine in engines:
        path, task = tmp_path / f"{engine['engine']}.index", load_task(SPEC, arguments)
        build_index(SubsetTask(task, range(7, 40)), path, CONFIG, **options)
        named: dict[str, Any] = {"task_spec": SPEC, "task_arguments": arguments}
        add_examples(task, path, skip_existing=True, **named, **engine, **options)
        grown.append(contents(path))
    assert_same(*grown)
    assert len([name for name in grown[0] if name.endswith("examples.parquet")]) == 2


@pytest.mark.usefixtures("_cluster")
def test_actors_that_die_again_and_again_end_the_build(tmp_path: Path) -> None:
    from loopsway.indexer.building.ray_engine import WorkersDiedError

    with pytest.raises(WorkersDiedError, match=r"3 workers died over block \d; .* run the same command to go on"):
        build(tmp_path / "ray.index", kills=True)


@pytest.mark.usefixtures("_cluster")
def test_errors_of_actors_arrive_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no more words"):
        build(tmp_path / "raises.index", raises="no more words")
    with pytest.raises(NonFiniteExampleError, match=r"example 'train/48' .row 48. is not finite"):
        build(tmp_path / "nonfinite.index", nonfinite=True)
    finished = list((tmp_path / "nonfinite.index").glob("generations/*/blocks/*.json"))
    assert len(finished) < 4


PROGRAM = """
import sys
from cutting import BATCH_SIZE, BLOCK_ROWS, CONFIG
from loopsway.indexer import build_index, load_task
arguments = {"driver": 0, "pause_s": float(sys.argv[3])}
build_index(
    load_task(sys.argv[1], arguments), sys.argv[2], CONFIG, task_spec=sys.argv[1], task_arguments=arguments,
    block_rows=BLOCK_ROWS, batch_size=BATCH_SIZE, engine="ray", workers=2, progress=False,
)
"""


def test_a_driver_that_is_killed_can_be_run_again(whole_index: Path, tmp_path: Path) -> None:
    """In a process of its own, with a cluster that the build starts and ends."""
    path = tmp_path / "ray.index"
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, SPEC, str(path)]
    with subprocess.Popen([*command, "0.4"], cwd=Path(__file__).parents[1]) as driver:
        while not list(path.glob("generations/*/blocks/*.json")):
            assert driver.poll() is None
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    finished = {file: file.stat().st_mtime_ns for file in path.glob("generations/*/blocks/*.json")}
    assert 0 < len(finished) < 4
    subprocess.run([*command, "0"], cwd=Path(__file__).parents[1], check=True, timeout=120)
    assert_same(contents(path), contents(whole_index))
    assert all(file.stat().st_mtime_ns == modified for file, modified in finished.items())
    assert open_index(path).num_examples == 50


def test_a_task_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='engine="ray" needs task_spec'):
        build_index(load_task(SPEC), tmp_path / "x.index", CONFIG, engine="ray", progress=False)


def test_the_local_engine_imports_no_ray(tmp_path: Path) -> None:
    program = (
        "import sys; from cutting import CONFIG; from looped import LoopedTask;"
        "from loopsway.indexer import build_index;"
        f"build_index(LoopedTask(count=3), {str(tmp_path / 'x.index')!r}, CONFIG, progress=False);"
        "sys.exit('ray' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1], check=True)
