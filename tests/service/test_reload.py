"""A new generation takes the old one's place under load, and one that is damaged does not."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loopsway.client import Client, DeadlineError, FailedPreconditionError, NotFoundError
from loopsway.indexer import IndexDamagedError, compact_index, delete_examples, prune_index
from loopsway.service import Settings, create_server
from loopsway.service.catalog import Catalog
from loopsway.service.served import ServedIndex
from loopsway.service.worker import ModelWorker
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from serving import QUERIES, Served, commanded, running, wait_for, without_model

EXAMPLE = pb.FindInfluencesRequest(queries=[pb.Query(example_json=json.dumps(QUERIES[0]))], k=48)
POLL_S = 0.05


@pytest.fixture
def own_index(index_path: Path, tmp_path: Path) -> Path:
    """A copy that the test may change."""
    return shutil.copytree(index_path, tmp_path / "tiny.index")


def ids(answer: pb.FindInfluencesResponse) -> set[str]:
    return {each.example_id for side in (answer.results[0].total.proponents, answer.results[0].total.opponents)
            for each in side}  # fmt: skip


def generation(served: Served) -> int:
    return served.stub.GetIndex(pb.GetIndexRequest()).index.generation


def is_serving(served: Served) -> bool:
    health: Any = health_pb2_grpc.HealthStub(served.channel)
    status = health.Check(health_pb2.HealthCheckRequest(service="tiny")).status
    return status == health_pb2.HealthCheckResponse.SERVING


def test_generations_change_under_load_without_a_failed_request(serve: Callable[..., Served], own_index: Path) -> None:
    served = serve(path=own_index, reload_poll_s=POLL_S, max_waiting=100)
    everything = ids(served.stub.FindInfluences(EXAMPLE))
    assert len(everything) == 48
    by_id = pb.FindInfluencesRequest(queries=[pb.Query(example_id="tiny-40")], k=48)
    changed = threading.Event()
    left = {1: everything, 2: everything - {"tiny-3"}, 3: everything - {"tiny-3"}}

    def client(number: int) -> dict[int, int]:
        """How many answers came of each generation, each of them right for it."""
        counts: dict[int, int] = {}
        with grpc.insecure_channel(served.target, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            stub = AttributionStub(channel)
            last = 0
            while not (changed.is_set() and last > 20):
                answer = stub.FindInfluences((EXAMPLE, by_id)[number % 2])
                assert ids(answer) <= left[answer.generation]
                counts[answer.generation] = counts.get(answer.generation, 0) + 1
                last += changed.is_set()
        return counts

    with ThreadPoolExecutor(4) as clients:
        calls = [clients.submit(client, number) for number in range(4)]
        try:
            delete_examples(own_index, ids=["tiny-3"])
            wait_for(lambda: generation(served) == 2)
            compact_index(own_index, progress=False)
            wait_for(lambda: generation(served) == 3)
        finally:
            changed.set()
        counts = [call.result(60) for call in calls]  # raises what a request raised
    assert all(set(each) >= {1, 3} for each in counts), counts
    assert served.server.catalog.worker.num_starts == 1
    prune_index(own_index)
    old = f"{own_index}/generations/000001"
    gc.collect()  # what this test itself opened to change the index
    wait_for(lambda: old not in Path("/proc/self/maps").read_text())
    wait_for(lambda: len(served.server.catalog.worker.loaded) == 1)
    assert served.stub.FindInfluences(by_id).results


@pytest.mark.parametrize("damage", ["manifest", "missing", "codes"])
def test_a_damaged_generation_is_refused_once_and_the_old_one_goes_on(
    serve: Callable[..., Served], own_index: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    served = serve(path=own_index, reload_poll_s=POLL_S)
    whole = shutil.copytree(own_index, tmp_path / "next.index")
    delete_examples(whole, ids=["tiny-3"])
    if damage == "codes":
        compact_index(whole, progress=False)
    torn = shutil.copytree(whole, tmp_path / "torn.index")
    if damage == "manifest":
        (torn / "manifest.json").write_text((torn / "manifest.json").read_text()[:-40])
    elif damage == "codes":  # nothing but its digest tells
        flip(torn / "generations/000003/arrays.zarr/step_codes/c/1/0/0")
    else:
        for file in torn.rglob("*deleted*.parquet"):
            file.unlink()
    publish(torn, own_index)
    wait_for(lambda: "is refused" in caplog.text)
    answers = [served.stub.FindInfluences(EXAMPLE) for _ in range(20)]  # while several polls go by
    assert all("tiny-3" in ids(answer) for answer in answers)
    assert is_serving(served)
    assert generation(served) == 1
    assert caplog.text.count("is refused") == 1, "it is not tried again before the manifest changes"
    shutil.rmtree(torn)
    publish(whole, own_index)
    if damage != "manifest":  # the same manifest, so that it is not looked at again: a later one is
        delete_examples(own_index, ids=["tiny-4"])
    wait_for(lambda: generation(served) > 1)
    assert "tiny-3" not in ids(served.stub.FindInfluences(EXAMPLE))


def flip(file: Path) -> None:
    """Changes bytes in the middle of it, and not its size."""
    content = bytearray(file.read_bytes())
    middle = slice(len(content) // 2, len(content) // 2 + 64)
    content[middle] = bytes(0xFF - byte for byte in content[middle])
    file.write_bytes(content)


def publish(made: Path, served: Path) -> None:
    """Brings a generation that was made elsewhere over, its manifest last."""
    for file in sorted(made.rglob("*"), key=lambda file: file.name == "manifest.json"):
        if file.is_file():
            target = served / file.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".new")
            shutil.copy(file, partial)
            partial.replace(target)


def test_a_reload_that_is_asked_for_takes_the_new_generation_over(
    serve: Callable[..., Served], own_index: Path
) -> None:
    served = serve(path=own_index, reload_poll_s=0)
    with Client(served.target) as client:
        first = client.reload_index()
        assert first == client.get_index()
        assert (first.generation, first.refused) == (1, None)
        delete_examples(own_index, ids=["tiny-3"])
        assert client.get_index() == first, "unasked"
        again = client.reload_index("tiny")
        assert again == client.get_index()
        assert (again.generation, again.num_examples) == (2, 47)
        assert "tiny-3" not in ids(served.stub.FindInfluences(EXAMPLE))
        with pytest.raises(NotFoundError, match="no index 'other'"):
            client.reload_index("other")
    assert dict(served.server.catalog.reloads) == {("tiny", "done"): 1}


def test_a_reload_says_why_a_generation_is_refused_and_takes_it_once_it_is_mended(
    serve: Callable[..., Served], own_index: Path
) -> None:
    served = serve(path=own_index, model=False, reload_poll_s=0)
    delete_examples(own_index, ids=["tiny-3"])
    (table,) = own_index.rglob("*deleted*.parquet")
    content = table.read_bytes()
    table.unlink()
    start = datetime.now(UTC)
    with Client(served.target) as client:
        with pytest.raises(FailedPreconditionError) as caught:
            client.reload_index()
        reason = "its files are damaged or incomplete; `loopsway verify` names them"
        assert f"generation 2 of index tiny is refused, generation 1 goes on: {reason}" in str(caught.value)
        refused = client.get_index().refused
        assert refused is not None
        assert (refused.generation, refused.reason) == (2, reason)
        assert start <= refused.refused_at <= datetime.now(UTC)
        assert client.list_indices() == [client.get_index()]
        assert str(own_index) not in f"{caught.value}{refused}"
        (own_index / "manifest.json").write_text("{")
        with pytest.raises(FailedPreconditionError, match="generation unknown of index tiny is refused"):
            client.reload_index()
        assert getattr(client.get_index().refused, "generation", 0) is None
        shutil.copy(own_index / "manifests" / "000002.json", own_index / "manifest.json")
        table.write_bytes(content)
        assert (client.reload_index().generation, client.get_index().refused) == (2, None)


@pytest.mark.parametrize("damage", ["table", "manifest", "chunk"])
def test_a_server_starts_with_the_newest_generation_that_is_sound(
    index_path: Path, own_index: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    delete_examples(own_index, ids=["tiny-3"])
    compact_index(own_index, progress=False)
    delete_examples(own_index, ids=["tiny-4"])
    if damage == "table":
        (file,) = own_index.glob("generations/000004/*deleted*.parquet")
    elif damage == "manifest":
        file = own_index / "manifest.json"
        (own_index / "manifests" / "000004.json").unlink()
    else:  # is missed when it is warmed up; generation 3 is without it, too
        file = own_index / "generations/000003/arrays.zarr/total_codes/c/0/0"
    content = file.read_bytes()
    if damage == "manifest":
        file.write_bytes(content[:-40])
    else:
        file.unlink()
    sound = without_model(index_path).model_copy(update={"name": "sound"})
    settings = Settings(indices=(without_model(own_index), sound), port=0, grace_s=0, reload_poll_s=0)
    refused, answers = ("unknown" if damage == "manifest" else 4), (2 if damage == "chunk" else 3)
    with running(settings) as (_, port), Client(f"127.0.0.1:{port}") as client:
        text = f"generation {refused} of index tiny is refused, it answers from generation "
        assert any(text in each.getMessage() for each in caplog.records if each.levelname == "ERROR")
        tiny, other = client.get_index("tiny"), client.get_index("sound")
        assert (tiny.generation, other.generation, other.refused) == (answers, 1, None)
        assert tiny.refused is not None
        assert tiny.refused.reason == "its files are damaged or incomplete; `loopsway verify` names them"
        with pytest.raises(FailedPreconditionError, match=f"generation {refused} of index tiny is refused, generation"):
            client.reload_index("tiny")
        file.write_bytes(content)
        assert (client.reload_index("tiny").generation, client.get_index("tiny").refused) == (4, None)


def test_a_server_does_not_start_without_a_generation_of_each_index(index_path: Path, own_index: Path) -> None:
    (own_index / "generations/000001/examples.parquet").unlink()
    sound = without_model(index_path).model_copy(update={"name": "sound"})
    with pytest.raises(IndexDamagedError, match=r"examples\.parquet is missing"):
        create_server(Settings(indices=(sound, without_model(own_index)), port=0))


async def test_a_refused_generation_is_tried_once_more_however_many_ask(own_index: Path) -> None:
    served, worker = ServedIndex(without_model(own_index), Settings()), ModelWorker(Settings())
    delete_examples(own_index, ids=["tiny-3"])
    (table,) = own_index.rglob("*deleted*.parquet")
    content = table.read_bytes()
    table.unlink()
    await asyncio.gather(*(served.look(worker, again=True) for _ in range(20)))
    assert dict(served.outcomes) == {"refused": 2}
    await served.look(worker)
    assert dict(served.outcomes) == {"refused": 2}, "unasked"
    table.write_bytes(content)
    await asyncio.gather(*(served.look(worker, again=True) for _ in range(20)))
    assert dict(served.outcomes) == {"refused": 2, "done": 1}
    served.engine.close()


def test_a_reload_goes_on_when_its_caller_waits_no_longer(serve: Callable[..., Served], own_index: Path) -> None:
    served = serve(path=own_index, reload_poll_s=0)
    delete_examples(own_index, ids=["tiny-3"])
    served.gate.hold()
    try:
        with Client(served.target) as client, pytest.raises(DeadlineError):
            client.reload_index(timeout_s=0.5)
        assert generation(served) == 1
        served.gate.wait_until_entered()  # the new generation's warm-up
    finally:
        served.gate.open()
    wait_for(lambda: generation(served) == 2)


def test_sighup_points_aliases_elsewhere_and_finds_generations(own_index: Path, tmp_path: Path) -> None:
    other = shutil.copytree(own_index, tmp_path / "other.index")
    config = tmp_path / "serve.toml"
    text = (
        "port = 0\nreload_poll_s = 0\n"
        f"indices = [{{path = '{own_index}', model = false}}, {{path = '{other}', name = 'second', model = false}}]\n"
    )
    config.write_text(text + "aliases = {live = 'tiny'}\n")
    with commanded(config) as (child, client):
        assert client.get_index("live").name == "tiny"
        assert [(index.name, index.aliases) for index in client.list_indices()] == [("second", ()), ("tiny", ("live",))]
        config.write_text(text + "aliases = {live = 'second'}\n")
        delete_examples(other, ids=["tiny-3"])
        assert (client.get_index("live").name, client.get_index("second").generation) == ("tiny", 1), "unasked"
        child.send_signal(signal.SIGHUP)
        wait_for(lambda: client.get_index("live").name == "second")
        assert (client.get_index("tiny").aliases, client.get_index("second").aliases) == ((), ("live",))
        wait_for(lambda: client.get_index("live").generation == 2)
        config.write_text(text + "aliases = {live = 'none'}\n")
        child.send_signal(signal.SIGHUP)
        wait_for(lambda: "alias live is of index none" in config.with_name("log").read_text())
        assert client.get_index("live").name == "second"
        assert "no effect on a running server" not in config.with_name("log").read_text()
        config.write_text(f"port = 0\nreload_poll_s = 0\nindices = [{{path = '{other}', model = false}}]\n")
        child.send_signal(signal.SIGHUP)
        wait_for(lambda: "of no effect on a running server: indices;" in config.with_name("log").read_text())
        assert [index.name for index in client.list_indices()] == ["second", "tiny"]


def test_an_alias_that_an_index_has_for_its_name_is_refused(own_index: Path) -> None:
    indices = (without_model(own_index),)
    with pytest.raises(ValueError, match="alias tiny is the name of an index itself"):
        Catalog(Settings(indices=indices, aliases={"tiny": "tiny"}))
