"""A small real index, and real servers of it on free ports of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from loopsway.indexer import ExampleSketcher, Index, build_index, load_task, open_index
from loopsway.service import Settings
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from serving import CONFIG, QUERIES, TASK_SPEC, Gate, Served, asked_for, running, wait_for, without_model


@pytest.fixture(scope="session")
def index_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("indices") / "tiny.index"
    build_index(load_task(TASK_SPEC), path, CONFIG, task_spec=TASK_SPEC, progress=False)
    return path


@pytest.fixture(scope="session")
def index(index_path: Path) -> Index:
    return open_index(index_path)


@pytest.fixture(scope="session")
def sketcher(index: Index) -> ExampleSketcher:
    return ExampleSketcher(load_task(TASK_SPEC), index.config)


@pytest.fixture(scope="session")
def sketches(sketcher: ExampleSketcher) -> np.ndarray:
    """Of QUERIES, float32 [4, 3, 256]."""
    task = load_task(TASK_SPEC)
    return sketcher.sketch([task.example_from_json(query) for query in QUERIES]).values.numpy()


@pytest.fixture(scope="module")
def serve(index_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Served]]:
    """Starts servers that end with the module: `serve(path=index_path, model=True, **settings)`."""
    with ExitStack() as stack:

        def start(*, path: Path = index_path, model: bool = True, **limits: Any) -> Served:
            gate = Gate(tmp_path_factory.mktemp("gate"))
            asked = asked_for(path, gate) if model else without_model(path)
            settings = Settings(indices=(asked,), **{"port": 0, "grace_s": 1.0, "batch_size": 8} | limits)
            server, port = stack.enter_context(running(settings))
            target = f"127.0.0.1:{port}"
            channel = stack.enter_context(grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]))
            return Served(target=target, stub=AttributionStub(channel), channel=channel, server=server, gate=gate)

        yield start


@pytest.fixture(scope="module")
def served(serve: Callable[..., Served]) -> Served:
    """A server with default limits."""
    return serve()


@pytest.fixture
def json_child() -> Callable[..., AbstractContextManager[tuple[AttributionStub, subprocess.Popen[str]]]]:
    """Runs `loopsway serve` in a process of its own, with its log as JSON: `json_child(index, folder)`."""

    @contextmanager
    def start(index: Path, folder: Path) -> Iterator[tuple[AttributionStub, subprocess.Popen[str]]]:
        ready = folder / "ready.json"
        command = [sys.executable, "-m", "loopsway.cli", "serve", "--index", index, "--task", TASK_SPEC, "--port", "0"]
        environment = os.environ | {"LOOPSWAY_LOG_FORMAT": "json"}
        with subprocess.Popen(
            [*command, "--ready-file", ready],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                wait_for(lambda: ready.exists() or process.poll() is not None, 90)
                target = f"127.0.0.1:{json.loads(ready.read_text())['port']}"
                with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
                    yield AttributionStub(channel), process
            finally:
                process.kill()

    return start
