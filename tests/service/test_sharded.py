"""Real servers of indices that are read in actors on a real Ray cluster of two nodes, whoever changes or dies."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

import object_store
from loopsway.client import (
    Client,
    FailedPreconditionError,
    IdQuery,
    InfluenceResult,
    SketchQuery,
    UnavailableError,
)
from loopsway.indexer import Index, build_index, compact_index, delete_examples, load_task, open_index
from loopsway.indexer.store.addresses import open_folder
from loopsway.service import IndexSettings, Server, Settings
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from serving import CONFIG, TASK_SPEC, asked_for, running, wait_for

ray: Any = pytest.importorskip("ray", reason="Ray is not installed; pip install 'loopsway[ray]'")

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)

PATIENCE_S = 60
CPUS = 6  # of each node, in Ray's books: one of them alone holds two indices' shards and a new generation's
IN_ACTORS: dict[str, Any] = {"engine": "ray", "workers": 2}
QUERIES = [pb.Query(example_id=f"tiny-{row}") for row in (3, 40)]
REQUESTS: dict[str, Any] = {
    "FindInfluences": pb.FindInfluencesRequest(queries=QUERIES, k=7, resolve=pb.RESOLVE_MODE_TRAIN_STEP),
    "ScoreExamples": pb.ScoreExamplesRequest(queries=QUERIES),
    "FindNeighbors": pb.FindNeighborsRequest(example_ids=["tiny-3", "tiny-40"]),
}


@pytest.fixture(scope="module")
def cluster(store_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes, on this machine, whose actors reach the object store too."""
    from ray.cluster_utils import Cluster

    cache = {"LOOPSWAY_CACHE": str(tmp_path_factory.mktemp("cache"))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (store_variables | cache).items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": CPUS, "include_dashboard": False})
        cluster.add_node(num_cpus=CPUS)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        yield cluster
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def servers(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Server, str]]]:
    """Of one index in six blocks, read by one process and in two actors; and where they answer."""
    path = tmp_path_factory.mktemp("sharded") / "tiny.index"
    build_index(load_task(TASK_SPEC), path, CONFIG, task_spec=TASK_SPEC, block_rows=8, progress=False)
    with ExitStack() as stack:
        servers = {}
        for name, reading in (("local", {}), ("ray", IN_ACTORS)):
            indices = (asked_for(path).model_copy(update=reading),)
            settings = Settings(indices=indices, port=0, grace_s=1, batch_timeout_s=3)
            server, port = stack.enter_context(running(settings))
            servers[name] = server, f"127.0.0.1:{port}"
        yield servers


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


def of_shards(server: Server, tell: Callable[[], Any]) -> list[Any]:
    """What this gives in the process of each shard of a server's only index."""
    [engine] = server.catalog.values()
    shards: Any = engine.index.reader._shards
    return ray.get([place.actor.__ray_call__.remote(lambda _: tell()) for place in shards._places])


@pytest.fixture
def hanging(servers: dict[str, tuple[Server, str]]) -> Iterator[int]:
    """The first shard's process, which stands still; it is killed at the end."""
    pid, _ = of_shards(servers["ray"][0], os.getpid)
    os.kill(pid, signal.SIGSTOP)
    yield pid
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("method", REQUESTS)
def test_answers_are_those_of_one_process(stubs: dict[str, AttributionStub], method: str) -> None:
    got, want = (asked(stubs[name], method) for name in ("ray", "local"))
    assert got == want
    assert {response.coverage for response in got} == {1}


def test_shards_lie_on_different_nodes_and_those_of_a_lost_one_go_to_another(
    cluster: Any, servers: dict[str, tuple[Server, str]], stubs: dict[str, AttributionStub]
) -> None:
    def nodes() -> set[str]:
        return set(of_shards(servers["ray"][0], lambda: ray.get_runtime_context().get_node_id()))

    def coverage() -> float:
        return asked(stubs["ray"], "FindInfluences", timeout_s=3)[0].coverage

    assert len(nodes()) == 2
    [lost] = cluster.worker_nodes
    cluster.remove_node(lost, allow_graceful=False)
    wait_for(lambda: coverage() == 0.5, PATIENCE_S)
    wait_for(lambda: coverage() == 1, PATIENCE_S)
    assert asked(stubs["ray"], "FindInfluences") == asked(stubs["local"], "FindInfluences")
    assert len(nodes()) == 1


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


def test_a_batch_of_a_stream_waits_for_a_shard_as_long_as_the_server_says(
    stubs: dict[str, AttributionStub], targets: dict[str, str], hanging: int
) -> None:
    with Client(targets["ray"], timeout_s=20, overload_retries=0) as client:
        [answer] = client.stream_influences([IdQuery("tiny-3")], k=2)
        assert isinstance(answer, InfluenceResult)
        assert answer.coverage == 0.5
        [refused] = client.stream_influences([IdQuery("tiny-3")], k=2, require_full_coverage=True)
        assert isinstance(refused, UnavailableError)
        assert "50% of the shards of index tiny answered in time" in str(refused)
    os.kill(hanging, signal.SIGKILL)
    wait_for(lambda: asked(stubs["ray"], "FindInfluences")[0].coverage == 1, PATIENCE_S)


@contextmanager
def asking(target: str, query: SketchQuery) -> Iterator[list[Any]]:
    """Asks again and again meanwhile, and fails if a request does; gives the answers so far."""
    answers, failures, ending = list[Any](), list[BaseException](), threading.Event()

    def ask() -> None:
        with Client(target) as client:
            while not ending.wait(0.02) and not failures:
                try:
                    answers.extend(client.find_influences([query], k=48, require_full_coverage=True))
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        ending.set()
        for thread in threads:
            thread.join()
    assert not failures


def ranked(index: Index, query: SketchQuery) -> list[tuple[str, float]]:
    total = index.search(query.values, k=48).total
    return [pair for side in (total.proponents, total.opponents)
            for pair in zip(side.example_ids, side.influences.tolist(), strict=True)]  # fmt: skip


def free_cpus() -> float:
    return ray.available_resources().get("CPU", 0)


@pytest.mark.usefixtures("cluster")
def test_a_generation_in_an_object_store_is_taken_over_under_load_or_refused(sketches: Any) -> None:
    url = f"s3://{object_store.BUCKET}/sharded/tiny.index"
    index = build_index(load_task(TASK_SPEC), url, CONFIG, task_spec=TASK_SPEC, block_rows=8, progress=False)
    query = SketchQuery(sketches[0], index.fingerprint)
    expected = {1: ranked(index, query)}
    before = free_cpus()
    settings = Settings(indices=(IndexSettings(path=url, model=False, **IN_ACTORS),), port=0, reload_poll_s=0)
    with running(settings) as (_, port), Client(f"127.0.0.1:{port}", timeout_s=PATIENCE_S) as client:
        with asking(f"127.0.0.1:{port}", query) as answers:
            wait_for(lambda: answers)
            delete_examples(url, ids=["tiny-3"])
            expected[2] = ranked(open_index(url), query)
            assert client.reload_index().generation == 2
            compact_index(url, progress=False)
            folder = open_folder(url)
            folder.remove(file for file in folder.files("generations/000003") if "step_codes/c/1/4" in file)
            for file in Path(os.environ["LOOPSWAY_CACHE"]).glob("[!.]*"):
                file.unlink()  # or it would be read from there
            with pytest.raises(FailedPreconditionError, match="tiny is refused, generation 2 goes on: its files are"):
                client.reload_index()
            count = len(answers)
            wait_for(lambda: len(answers) > count + 4)
        wait_for(lambda: free_cpus() == before - 2, PATIENCE_S)
    for answer in answers:
        found = [(each.example_id, each.influence) for side in (answer.total.proponents, answer.total.opponents)
                 for each in side]  # fmt: skip
        assert found == expected[answer.generation]
    assert {answer.generation for answer in answers} == {1, 2}
    wait_for(lambda: free_cpus() == before, PATIENCE_S)
