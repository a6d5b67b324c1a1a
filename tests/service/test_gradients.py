"""Queries as gradients, over the wire: their sketch is the example's, and what is not what was declared is refused."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from looped import LoopedTask
from loops import UsedOutside
from loopsway.client import (
    AsyncClient,
    Client,
    DenseGradient,
    ExampleQuery,
    FactoredGradient,
    FailedPreconditionError,
    GradientPiece,
    InvalidQueryError,
    LoopswayError,
    NotFoundError,
    OverloadedError,
    QueryGradients,
    RowGradient,
)
from loopsway.client.gradients import CHUNK_BYTES, gradient_requests
from loopsway.indexer import ExampleSketcher, SketchConfig, build_index, load_task, query_gradients
from loopsway.service import IndexSettings, Settings
from loopsway.service.server import Server
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub
from serving import QUERIES, TASK_FILE, TASK_SPEC, Served, running, wait_for, without_model

TOLERANCE = 1e-5
# What gradients of each model come as: those of one that has to be untied are entries alone.
FORMS: dict[str, set[type[GradientPiece]]] = {
    "InjectedModel": {FactoredGradient, DenseGradient},
    "RangeModel": {FactoredGradient, DenseGradient},
    "CellModel": {DenseGradient},
    "UsedOutside": {FactoredGradient, DenseGradient, RowGradient},
}


class OutsideTask(LoopedTask):
    """Of a model whose embedding is tied to its readout, attributed to as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self._kind, self.loop = UsedOutside, UsedOutside.loop


def task_of(kind: str) -> LoopedTask:
    return OutsideTask() if kind == "UsedOutside" else LoopedTask(kind)


@pytest.fixture(scope="module")
def looped_target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of an index of each kind, without their models."""
    folder = tmp_path_factory.mktemp("looped")
    for kind in FORMS:
        build_index(task_of(kind), folder / f"{kind}.index", SketchConfig(width=256, bits=8), progress=False)
    indices = [without_model(folder / f"{kind}.index") for kind in FORMS]
    with running(Settings(indices=indices, port=0, grace_s=1.0)) as (_, port):
        yield f"127.0.0.1:{port}"


def gradients_of(task: Any, examples: Sequence[Any]) -> list[QueryGradients]:
    models = {checkpoint.name: task.model(checkpoint) for checkpoint in task.checkpoints()}
    return query_gradients(models, task.loop, task.losses, task.collate(examples))


def in_full(query: QueryGradients, shapes: dict[str, tuple[int, ...]]) -> QueryGradients:
    """The same with all entries of every parameter, by numpy alone."""
    pieces = []
    for piece in query.pieces:
        out = np.zeros(shapes[piece.parameter])
        match piece:
            case FactoredGradient():
                out += piece.output_gradients.T.astype(np.float64) @ piece.inputs
            case RowGradient():
                np.add.at(out, piece.rows, piece.values)
            case DenseGradient():
                out.reshape(-1)[piece.start : piece.start + piece.values.size] += piece.values.ravel()
        where = {"checkpoint": piece.checkpoint, "parameter": piece.parameter, "step": piece.step}
        pieces.append(DenseGradient(**where, values=out))
    return QueryGradients(num_steps=query.num_steps, pieces=tuple(pieces))


def in_factors(query: QueryGradients, shapes: dict[str, tuple[int, ...]]) -> QueryGradients:
    """The same with each matrix as a product of two, each with as many terms as it has rows."""
    draw, pieces = np.random.default_rng(0), list[GradientPiece]()
    for piece in in_full(query, shapes).pieces:
        assert isinstance(piece, DenseGradient)
        if piece.values.ndim == 2:
            turn, _ = np.linalg.qr(draw.standard_normal((len(piece.values), len(piece.values))))
            where = {"checkpoint": piece.checkpoint, "parameter": piece.parameter, "step": piece.step}
            pieces.append(FactoredGradient(**where, output_gradients=turn, inputs=turn @ piece.values))
        else:
            pieces.append(piece)
    return QueryGradients(num_steps=query.num_steps, pieces=tuple(pieces))


@pytest.mark.parametrize("kind", FORMS)
def test_the_server_sketches_factors_and_dense_gradients_as_it_does_the_example(looped_target: str, kind: str) -> None:
    task = task_of(kind)
    sketcher = ExampleSketcher(task, SketchConfig(width=256, bits=8))
    examples = task.examples()[:2]
    want = sketcher.sketch(examples).values.numpy()
    queries = gradients_of(task, examples)
    forms = {type(piece) for piece in queries[0].pieces}
    assert forms == FORMS[kind]
    with Client(looped_target) as client:
        for query, expected in zip(queries, want, strict=True):
            for form in (query, in_full(query, sketcher.parameters)):
                sketch = client.sketch_gradients(form, index=kind)
                assert sketch.fingerprint == sketcher.fingerprint
                error = np.linalg.norm(sketch.values - expected) / np.linalg.norm(expected)
                assert error <= TOLERANCE, f"{error:.2g}"
            [answer] = client.find_influences([sketch], index=kind, k=3)
            assert answer.query.num_steps == query.num_steps


@pytest.fixture(scope="module")
def query() -> QueryGradients:
    task = load_task(TASK_SPEC)
    return gradients_of(task, [task.example_from_json(QUERIES[0])])[0]


async def test_both_clients_send_gradients_and_say_how_far_they_are(
    served: Served, query: QueryGradients, sketches: np.ndarray
) -> None:
    async with AsyncClient(served.target) as client:
        told: list[tuple[int, int]] = []
        sketch = await client.sketch_gradients(query, on_progress=lambda *sent: told.append(sent))
    np.testing.assert_allclose(np.asarray(sketch.values), sketches[0], atol=1e-5 * float(np.abs(sketches[0]).max()))
    assert told == sorted(told)
    assert len(told) == len(query.pieces)
    assert told[-1][0] == told[-1][1]


def test_large_pieces_are_cut_into_messages_that_add_up(served: Served, query: QueryGradients) -> None:
    draw = np.random.default_rng(0)
    terms = CHUNK_BYTES // 16
    piece = FactoredGradient(
        checkpoint="early",
        parameter="block.0.weight",
        step=1,
        output_gradients=draw.standard_normal((terms, 8)).astype(np.float16),
        inputs=draw.standard_normal((terms, 8)),
    )
    large = QueryGradients(num_steps=3, pieces=(piece,))
    messages = list(gradient_requests(large, ""))
    assert len(messages) >= 6
    assert max(message.ByteSize() for message in messages) <= CHUNK_BYTES + 1000
    product = DenseGradient(
        checkpoint="early",
        parameter="block.0.weight",
        step=1,
        values=piece.output_gradients.T.astype(np.float64) @ piece.inputs,
    )
    with Client(served.target) as client:
        got, want = (
            np.asarray(client.sketch_gradients(each).values) for each in (large, replace(large, pieces=(product,)))
        )
    assert np.linalg.norm(got - want) <= TOLERANCE * np.linalg.norm(want)


Change = Callable[[list[pb.SketchGradientsRequest]], object]


def _header(**values: Any) -> Change:
    def change(requests: list[pb.SketchGradientsRequest]) -> None:
        for name, value in values.items():
            setattr(requests[0].header, name, value)

    return change


def _first_piece(**values: Any) -> Change:
    def change(requests: list[pb.SketchGradientsRequest]) -> None:
        for name, value in values.items():
            setattr(requests[1].piece, name, value)

    return change


def _with_nan(requests: list[pb.SketchGradientsRequest]) -> None:
    (tensor,) = [each for form in requests[1].piece.ListFields() if hasattr(form[1], "ListFields")
                 for _, each in form[1].ListFields() if isinstance(each, pb.Tensor)][:1]  # fmt: skip
    tensor.data = np.full(len(tensor.data) // 4, np.nan, np.float32).tobytes()


WRONG: dict[str, tuple[Change, str, str]] = {
    "no header": (lambda requests: requests.pop(0), "header", "does not begin with its header"),
    "two headers": (lambda requests: requests.insert(1, requests[0]), "part", "expected a piece or the end"),
    "no steps": (_header(step_count=0), "header.step_count", "step_count is 0, expected 1 to 1024"),
    "over the cap": (
        _header(total_bytes=1 << 40),
        "header.total_bytes",
        f"index tiny takes 1 to {1 << 30} of one query",
    ),
    "less than declared": (_header(total_bytes=1 << 20), "header.total_bytes", f"the header declared {1 << 20}"),
    "more than declared": (_header(total_bytes=3), "piece", "the header declared 3"),
    "cut off": (lambda requests: requests.pop(), "end", "was cut off after"),
    "wrong checksum": (
        lambda requests: requests[-1].CopyFrom(pb.SketchGradientsRequest(end=pb.GradientEnd(sha256=b"0" * 32))),
        "end.sha256",
        "the SHA-256 of what came is",
    ),
    "unknown parameter": (_first_piece(parameter="readout.weight"), "piece", "no parameter 'readout.weight'"),
    "unknown checkpoint": (_first_piece(checkpoint="best"), "piece", "no checkpoint 'best', only early, late"),
    "step beyond": (_first_piece(step=3), "piece", "step is 3, expected 0 to 2"),
    "empty piece": (
        lambda requests: requests[1].CopyFrom(pb.SketchGradientsRequest(piece=pb.GradientPiece(checkpoint="early"))),
        "piece",
        "expected dense, factors or rows",
    ),
    "nan": (_with_nan, "piece", "infinite, not a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_stream_is_an_invalid_argument_that_names_the_field(
    served: Served, query: QueryGradients, case: str
) -> None:
    change, field, text = WRONG[case]
    requests = list(gradient_requests(query, ""))
    change(requests)
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.SketchGradients(iter(requests), timeout=60)
    error: Any = caught.value  # gRPC's errors are calls too
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert text in error.details()
    with Client(served.target) as client, pytest.raises(InvalidQueryError) as told:
        client._call(client._stub.SketchGradients, iter(requests), 60, None)  # type: ignore[arg-type]
    assert (told.value.field or "").startswith(field)


def test_a_flipped_bit_on_the_way_is_seen(served: Served, query: QueryGradients) -> None:
    requests = list(gradient_requests(query, ""))
    dense = next(each.piece.dense.values for each in requests if each.piece.WhichOneof("form") == "dense")
    data = bytearray(dense.data)
    data[0] ^= 1
    dense.data = bytes(data)
    with pytest.raises(grpc.RpcError) as caught:
        served.stub.SketchGradients(iter(requests), timeout=60)
    assert "the end says" in (caught.value.details() or "")


def test_clients_say_what_is_wrong_with_their_gradients(served: Served, query: QueryGradients) -> None:
    uneven = FactoredGradient(
        checkpoint="early", parameter="block.0.weight", step=0, output_gradients=np.ones((2, 8)), inputs=np.ones((1, 8))
    )
    with Client(served.target) as client:
        with pytest.raises(NotFoundError, match="no index 'other'") as caught:
            client.sketch_gradients(query, index="other")
        assert caught.value.field == "header.index"
        with pytest.raises(InvalidQueryError, match="expected one length"):
            client.sketch_gradients(replace(query, pieces=(uneven,)))
        with pytest.raises(InvalidQueryError, match="a piece is a str"):
            client.sketch_gradients(replace(query, pieces=("piece",)))  # type: ignore[arg-type]
        with pytest.raises(LoopswayError, match="are 0 bytes, index tiny takes 1 to"):
            client.sketch_gradients(replace(query, pieces=()))


def test_each_index_has_a_limit_of_its_own_or_the_servers(index_path: Path, query: QueryGradients) -> None:
    size = sum(tensor.nbytes for piece in query.pieces for tensor in vars(piece).values() if hasattr(tensor, "nbytes"))
    limits = {"own": size, "small": size - 1, "others": None}
    indices = [without_model(index_path).model_copy(update={"name": name, "max_gradient_bytes": most})
               for name, most in limits.items()]  # fmt: skip
    settings = Settings(indices=indices, port=0, grace_s=1.0, max_gradient_bytes=size + 1)
    with running(settings) as (_, port), Client(f"127.0.0.1:{port}") as client:
        told = {info.name: info.max_gradient_bytes for info in client.list_indices()}
        assert told == {"own": size, "small": size - 1, "others": size + 1}
        own, others = (client.sketch_gradients(query, index=name) for name in ("own", "others"))
        np.testing.assert_array_equal(np.asarray(own.values), np.asarray(others.values))
        with pytest.raises(
            InvalidQueryError, match=f"are {size} bytes, index small takes 1 to {size - 1} of one"
        ) as told:
            client.sketch_gradients(query, index="small")
        assert told.value.field == "header.total_bytes"


def until_admitted(client: Client, query: QueryGradients) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            client.sketch_gradients(query)
        except OverloadedError:
            assert time.monotonic() < deadline
        else:
            return


def open_stream(
    served: Served, client: Client, query: QueryGradients, ended: threading.Event
) -> tuple[Any, OverloadedError]:
    """A stream that has the server's only place and sends no more, and how the next one is refused."""
    requests = list(gradient_requests(query, ""))

    def halting() -> Iterator[pb.SketchGradientsRequest]:
        yield from requests[:2]
        ended.wait(60)

    stream = served.stub.SketchGradients.future(halting(), timeout=60)
    while True:
        try:
            client.sketch_gradients(query)
        except OverloadedError as error:
            return stream, error
        if stream.done():  # it came while this client's stream had the place
            stream = served.stub.SketchGradients.future(halting(), timeout=60)


def test_a_stream_that_stalls_is_ended_and_leaves_its_place(
    serve: Callable[..., Served], query: QueryGradients
) -> None:
    served, ended = serve(stall_s=2, max_streams=1), threading.Event()
    with Client(served.target, overload_retries=0) as client:
        stalled, refused = open_stream(served, client, query, ended)
        assert "1 streams open" in str(refused)
        assert refused.retry_after_s == 1
        error: Any = stalled.exception(60)
        ended.set()
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "did not come within 2 s" in error.details()
        until_admitted(client, query)


def test_a_stream_that_is_cut_leaves_its_place(serve: Callable[..., Served], query: QueryGradients) -> None:
    served, ended = serve(max_streams=1), threading.Event()
    with Client(served.target, overload_retries=0) as client:
        stream, _ = open_stream(served, client, query, ended)
        stream.cancel()
        ended.set()
        until_admitted(client, query)


AWARE = SketchConfig(width=256, bits=8, optimizer_aware=True)
AWARE_SPEC = f"{TASK_FILE}:AwareTask"


@pytest.fixture(scope="module")
def aware_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An optimizer-aware index."""
    path = tmp_path_factory.mktemp("aware") / "aware.index"
    build_index(load_task(AWARE_SPEC), path, AWARE, progress=False)
    return path


@pytest.fixture(scope="module")
def aware(aware_path: Path) -> Iterator[tuple[Server, Client]]:
    """Its server, whose memory holds the weights of one checkpoint alone: each loads when its pieces come."""
    indices = [IndexSettings(path=str(aware_path), task=AWARE_SPEC)]
    settings = Settings(indices=indices, port=0, grace_s=1.0, model_bytes=1)
    with running(settings) as (server, port), Client(f"127.0.0.1:{port}", overload_retries=0) as client:
        yield server, client


def test_an_optimizer_aware_index_sketches_gradients_as_it_does_the_example(
    aware: tuple[Server, Client], query: QueryGradients
) -> None:
    _, client = aware
    task, plain = load_task(AWARE_SPEC), load_task(TASK_SPEC)
    sketcher = ExampleSketcher(task, AWARE)
    want = sketcher.sketch([task.example_from_json(QUERIES[0])]).values[0].numpy()
    [example] = client.sketch_queries([ExampleQuery(QUERIES[0])])
    np.testing.assert_allclose(np.asarray(example.values), want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    unscaled = ExampleSketcher(plain, SketchConfig(width=256, bits=8)).sketch([plain.example_from_json(QUERIES[0])])
    assert np.linalg.norm(unscaled.values[0].numpy() - want) > 0.5 * np.linalg.norm(want), "scaling is no small thing"
    assert client.get_index().max_gradient_bytes == 1 << 30
    factored = in_factors(query, sketcher.parameters)
    assert {type(piece) for piece in factored.pieces} == {FactoredGradient, DenseGradient}
    turns = replace(query, pieces=tuple(sorted(query.pieces, key=lambda piece: piece.parameter)))
    assert [piece.checkpoint for piece in turns.pieces[:4]] == ["early"] * 3 + ["late"], "and then back again"
    for form in (query, turns, factored, in_full(query, sketcher.parameters)):
        sketch = client.sketch_gradients(form)
        assert sketch.fingerprint == sketcher.fingerprint
        error = np.linalg.norm(np.asarray(sketch.values) - want) / np.linalg.norm(want)
        assert error <= TOLERANCE, f"{error:.2g}"
    [answer] = client.find_influences([sketch], k=3)
    [same] = client.find_influences([example], k=3)
    assert [each.example_id for each in answer.total.proponents] == [each.example_id for each in same.total.proponents]


async def test_gradients_of_many_callers_are_scaled_side_by_side_with_examples(
    aware: tuple[Server, Client], query: QueryGradients
) -> None:
    _, client = aware
    want = np.asarray(await asyncio.to_thread(lambda: client.sketch_gradients(query).values))
    asked = [
        asyncio.to_thread(client.sketch_gradients, query) if turn % 2 else
        asyncio.to_thread(client.sketch_queries, [ExampleQuery(QUERIES[0])]) for turn in range(8)
    ]  # fmt: skip
    for found in await asyncio.gather(*asked):
        values = np.asarray((found[0] if isinstance(found, list) else found).values)
        np.testing.assert_allclose(values, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_a_wrong_gradient_of_an_optimizer_aware_index_is_named_too(
    aware: tuple[Server, Client], query: QueryGradients
) -> None:
    _, client = aware
    unknown = DenseGradient(checkpoint="early", parameter="readout.weight", step=0, values=np.ones(1))
    with pytest.raises(InvalidQueryError, match=r"no parameter 'readout\.weight'") as caught:
        client.sketch_gradients(replace(query, pieces=(*query.pieces, unknown)))
    assert caught.value.field == "piece.dense"
    assert client.sketch_gradients(query)


def test_gradients_under_way_when_the_models_process_dies_are_unavailable_and_later_ones_are_not(
    aware: tuple[Server, Client], query: QueryGradients
) -> None:
    server, client = aware
    worker, requests = server.catalog.worker, list(gradient_requests(query, ""))
    num_sketches = worker.num_sketches

    def sent() -> Iterator[pb.SketchGradientsRequest]:
        yield from requests[:2]
        wait_for(lambda: worker.num_sketches > num_sketches)
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        yield from requests[2:]

    with (  # without the client's own retries
        grpc.insecure_channel(client._target, options=[("grpc.enable_http_proxy", 0)]) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        AttributionStub(channel).SketchGradients(sent(), timeout=60)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "died" in error.details()
    wait_for(lambda: worker.num_starts > 1 and worker.pid is not None)
    assert client.sketch_gradients(query)


def test_an_optimizer_aware_index_without_its_model_says_what_to_do(aware_path: Path, query: QueryGradients) -> None:
    with (
        running(Settings(indices=[without_model(aware_path)], port=0, grace_s=1.0)) as (_, port),
        Client(f"127.0.0.1:{port}") as client,
    ):
        with pytest.raises(FailedPreconditionError, match=r"serve it with its task .*, or sketch where the task is"):
            client.sketch_gradients(query)
        assert client.get_index().max_gradient_bytes == 0
