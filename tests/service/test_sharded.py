"""A real server of an index that is read in actors on a real Ray cluster."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import pytest

from loopsway.client import Client, IdQuery, UnavailableError
from loopsway.indexer import build_index, load_task
from loopsway.service import Server, Settings
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from serving import CONFIG, TASK_SPEC, asked_for, running

ray: Any = pytest.importorskip("ray", reason="Ray is not installed; pip install 'loopsway[ray]'")

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)

PATIENCE_S = 60
QUERIES = [pb.Query(example_id=f"tiny-{row}") for row in (3, 40)]
REQUESTS: dict[str, Any] = {
    "FindInfluences": pb.FindInfluencesRequest(queries=QUERIES, k=7, resolve=pb.RESOLVE_MODE_TRAIN_STEP),
    "ScoreExamples": pb.ScoreExamplesRequest(queries=QUERIES),
    "FindNeighbors": pb.FindNeighborsRequest(example_ids=["tiny-3", "tiny-40"]),
}


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Server, str]]]:
    """Of one index in six blocks, read by one process and in two actors; and where they answer."""
    path = tmp_path_factory.mktemp("sharded") / "tiny.index"
    build_index(load_task(TASK_SPEC), path, CONFIG, task_spec=TASK_SPEC, block_rows=8, progress=False)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    in_actors: dict[str, Any] = {"engine": "ray", "workers": 2}
    with ExitStack() as stack:
        servers = {}
        for name, reading in (("local", {}), ("ray", in_actors)):
            settings = Settings(indices=(asked_for(path).model_copy(update=reading),), port=0, grace_s=1)
            server, port = stack.enter_context(running(settings))
            servers[name] = server, f"127.0.0.1:{port}"
        yield servers
    ray.shutdown()


@pytest.fixture(scope="module")
def targets(servers: dict[str, tuple[Server, str]]) -> dict[str, str]:
    return {name: target for name, (_, target) in servers.items()}


@pytest.fixture(scope="module")
def stubs(targets: dict[str, str]) -> Iterator[dict[str, AttributionStub]]:
    with ExitStack() as stack:
        options = [("grpc.enable_http_proxy", 0)]
        channels = {
            name: stack.enter_context(grpc.insecure_channel(at, options=options)) for name, at in targets.items()
        }
        yield {name: AttributionStub(channel) for name, channel in channels.items()}


def asked(stub: AttributionStub, method: str, *, timeout_s: float = 30, **changes: Any) -> list[Any]:
    """The response, or all of a stream."""
    request = type(REQUESTS[method])()
    request.CopyFrom(REQUESTS[method])
    request.MergeFrom(type(request)(**changes))
    answer = getattr(stub, method)(request, timeout=timeout_s)
    return list(answer) if method == "ScoreExamples" else [answer]


@pytest.fixture
def hanging(servers: dict[str, tuple[Server, str]]) -> Iterator[int]:
    """The first shard's process, which stands still; it is killed at the end."""
    [engine] = servers["ray"][0].catalog.values()
    shards: Any = engine.index.reader._shards
    pid = ray.get(shards._places[0].actor.__ray_call__.remote(lambda _: os.getpid()))
    os.kill(pid, signal.SIGSTOP)
    yield pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("method", REQUESTS)
def test_answers_are_those_of_one_process(stubs: dict[str, AttributionStub], method: str) -> None:
    got, want = (asked(stubs[name], method) for name in ("ray", "local"))
    assert got == want
    assert {response.coverage for response in got} == {1}


@pytest.mark.parametrize("method", REQUESTS)
def test_an_answer_without_a_shard_says_so_or_is_refused(
    stubs: dict[str, AttributionStub], targets: dict[str, str], hanging: int, method: str
) -> None:
    partial = asked(stubs["ray"], method, timeout_s=3)
    assert {response.coverage for response in partial} == {0.5}
    with pytest.raises(grpc.RpcError) as refusal:
        asked(stubs["ray"], method, timeout_s=3, require_full_coverage=True)
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE  # pyright: ignore[reportAttributeAccessIssue]
    assert "50% of the shards of index tiny answered in time" in refusal.value.details()  # pyright: ignore
    with Client(targets["ray"], timeout_s=3) as client:
        [result] = client.find_influences([IdQuery("tiny-3")], k=2)
        assert result.coverage == 0.5
        with pytest.raises(UnavailableError, match="50% of the shards"):
            client.find_influences([IdQuery("tiny-3")], k=2, require_full_coverage=True)
    os.kill(hanging, signal.SIGKILL)
    until = time.monotonic() + PATIENCE_S
    while (found := asked(stubs["ray"], method))[0].coverage < 1:
        assert time.monotonic() < until, "the shard does not come back"
        time.sleep(0.1)
    assert found == asked(stubs["local"], method, require_full_coverage=True)
