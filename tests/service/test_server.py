"""The process around the service: health, reflection, what it binds to, and how it begins and ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loopsway.service import Settings, create_server
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from loopsway.v1.tensors import to_tensor
from serving import QUERIES, TASK_SPEC, Gate, Served, asked_for, without_model

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

# What `loopsway serve` does.
CHILD = """
import sys
from pathlib import Path
from loopsway.service import Settings, serve

index, task, folder = sys.argv[1:]
asked = {"path": index, "task": task, "task_arguments": {"gate": folder}}
serve(Settings(indices=[asked], port=0, grace_s=30), ready_file=Path(folder, "ready.json"))
print("ended", flush=True)
"""


def test_health_is_serving_for_the_server_the_service_and_each_index(served: Served) -> None:
    stub: Any = health_pb2_grpc.HealthStub(served.channel)
    for name in ("", "loopsway.v1.Attribution", "tiny"):
        assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_an_index_is_not_serving_until_it_is_warm_and_tells_examples_to_come_back(
    index_path: Path, sketches: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(tmp_path)
    indices = (without_model(index_path).model_copy(update={"name": "first"}), asked_for(index_path, gate))
    gate.hold_loading()
    server, port = create_server(Settings(indices=indices, port=0, grace_s=0))
    starting = asyncio.create_task(server.start())
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            stub: Any = AttributionStub(channel)

            async def states() -> list[Any]:
                """Of the server, the service and each index."""
                asked = [health_pb2.HealthCheckRequest(service=name) for name in server.health_names]
                return [(await health.Check(each, wait_for_ready=True)).status for each in asked]

            def ask(query: pb.Query) -> Any:
                return stub.FindInfluences(pb.FindInfluencesRequest(index="tiny", queries=[query]))

            async for status in health.Watch(health_pb2.HealthCheckRequest(service="first"), wait_for_ready=True):
                if status.status == SERVING:
                    break
            assert server.health_names == ("", "loopsway.v1.Attribution", "first", "tiny")
            assert await states() == [NOT_SERVING, NOT_SERVING, SERVING, NOT_SERVING]
            for query in (pb.Query(example_json=json.dumps(QUERIES[0])), pb.Query(example_id="tiny-3")):
                with pytest.raises(grpc.aio.AioRpcError, match="index tiny is being warmed up") as caught:
                    await ask(query)
                assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
            sketch = pb.Sketch(values=to_tensor(sketches[0]), fingerprint=server.catalog["tiny"].index.fingerprint)
            assert (await ask(pb.Query(sketch=sketch))).results
            assert not starting.done()
            gate.open_loading()
            await starting
            assert await states() == [SERVING] * 4
            assert (await ask(pb.Query(example_json=json.dumps(QUERIES[0])))).results
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
    finally:
        gate.open_loading()
        await server.stop()


def test_reflection_lists_the_service_and_gives_its_proto(served: Served) -> None:
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="loopsway.v1.Attribution"),
    ]
    listed, found = stub.ServerReflectionInfo(iter(requests))
    names = {service.name for service in listed.list_services_response.service}
    assert names == {"loopsway.v1.Attribution", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    files = [FileDescriptorProto.FromString(file) for file in found.file_descriptor_response.file_descriptor_proto]
    assert "loopsway/v1/attribution.proto" in {file.name for file in files}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_an_address_that_others_reach_is_refused_unless_asked_for(index_path: Path, host: str) -> None:
    with pytest.raises(ValueError, match=f"host {host} is not loopback"):
        create_server(Settings(indices=(without_model(index_path),), host=host, port=0))


async def test_an_insecure_bind_is_possible_when_asked_for(index_path: Path) -> None:
    settings = Settings(indices=(without_model(index_path),), host="0.0.0.0", port=0, insecure_bind=True, grace_s=0)
    server, port = create_server(settings)
    assert port > 0
    await server.stop()


async def test_a_taken_port_is_an_error_that_names_it(index_path: Path, served: Served) -> None:
    settings = Settings(indices=(without_model(index_path),), port=int(served.target.rpartition(":")[2]))
    with pytest.raises(OSError, match=f"can't listen on {served.target}: the port is taken"):
        create_server(settings)


def test_two_indices_of_one_name_are_refused(index_path: Path) -> None:
    with pytest.raises(ValueError, match="two indices are named tiny: give one another name, as NAME=PATH"):
        create_server(Settings(indices=[without_model(index_path)] * 2))
    with pytest.raises(ValueError, match="no indices to serve"):
        create_server(Settings())


@dataclass(frozen=True, kw_only=True)
class Child:
    """A server in a process of its own."""

    process: subprocess.Popen[str]
    port: int
    folder: Path


@pytest.fixture
def child(index_path: Path, tmp_path: Path) -> Iterator[Child]:
    command = [sys.executable, "-W", "error", "-c", CHILD, index_path, TASK_SPEC, tmp_path]
    (tmp_path / "ready.json").write_text("left over")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            ready = wait_for(lambda: read_ready(tmp_path / "ready.json"), process)
            assert ready["pid"] == process.pid
            yield Child(process=process, port=ready["port"], folder=tmp_path)
        finally:
            process.kill()


def read_ready(file: Path) -> dict | None:
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError):  # not there yet, or the left-over
        return None


def wait_for(condition: Callable[[], dict | bool | None], process: subprocess.Popen[str]) -> dict:
    deadline = time.monotonic() + 90
    while not (found := condition()):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found if isinstance(found, dict) else {}


def is_refused(stub: AttributionStub) -> bool:
    try:
        stub.GetIndex(pb.GetIndexRequest(), timeout=20)
    except grpc.RpcError as error:
        return error.code() == grpc.StatusCode.UNAVAILABLE
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_running_requests_and_ends_the_server(child: Child, number: signal.Signals) -> None:
    request = pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(QUERIES[0]))])
    (child.folder / "held").touch()
    (child.folder / "entered").unlink()
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(f"127.0.0.1:{child.port}", options=options) as channel:
        stub = AttributionStub(channel)
        running = stub.FindInfluences.future(request)
        wait_for((child.folder / "entered").exists, child.process)
        os.kill(child.process.pid, number)
        wait_for(lambda: is_refused(stub), child.process)
        assert not (child.folder / "ready.json").exists()
        assert not running.done()
        (child.folder / "held").unlink()
        assert running.result(60).results
    output, errors = child.process.communicate(timeout=60)
    assert child.process.returncode == 0, errors
    assert output.splitlines() == [f"serving tiny on 127.0.0.1:{child.port}", "ended"]
    assert "FindInfluences OK request_id=" in errors
    assert "code=OK queries=1" in errors
