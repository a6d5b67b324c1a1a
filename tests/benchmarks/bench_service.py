"""What the service adds to its engine, how much it answers, and what it does under more than it can answer.

    python tests/benchmarks/bench_service.py [--minutes 10] [--smoke]

The service is `loopsway serve` in a process of its own. The engine is the service's own, in this process, with a model
process of its own, and is asked in turns with the service, so that other work on the machine slows both down. Times
are of the wall. Calls are those of the client's load, whose answers are parsed as messages. Under the mixed load, half
of the calls are examples and half sketches. What the queue promises is the server's `max_wait_s`: that no accepted
request waits for much longer. How long each waited is told by the server's log; in callers' times is the request's own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from measurement import markdown_table, parse_arguments
from served_gpt import ServedGPT
from service_process import PROMISE_S, TASK, Served, serving

from loopsway.cli.bench import quantiles_ms
from loopsway.client import ExampleQuery, SketchQuery
from loopsway.client.load import OK, Load, load_request
from loopsway.experiments.texts import synthetic_texts
from loopsway.indexer import Index, SketchConfig, build_index
from loopsway.service import Engine, IndexSettings, Settings
from loopsway.service import queries as engine_queries
from loopsway.service.loading import load_engine
from loopsway.service.worker import ModelWorker
from loopsway.v1 import attribution_pb2 as pb
from loopsway.v1.attribution_pb2_grpc import AttributionStub

K = 10
IN_A_ROW, UNCOUNTED = 20, 2
NUM_QUERIES, ENGINE_BATCHES, CALLERS, LOADS = 64, (1, 16, 32), (1, 4, 16), (0.5, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How long and how often things are measured.

    Attributes:
        dim: of the model.
        examples: in the index.
        calls: of each timing of single calls.
        seconds: of each load.
    """

    dim: int = 64
    examples: int = 2000
    calls: int = 400
    seconds: float = 5.0


SMOKE = Scale(dim=32, examples=40, calls=5, seconds=0.3)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A server and an engine of one index, and what both are asked.

    Attributes:
        examples: as the engine and as the client ask about them.
        sketches: the same queries, sketched before.
    """

    server: Served
    engine: Engine
    load: Load
    stub: AttributionStub
    blocking: AttributionStub
    health: Any
    examples: list[engine_queries.Query]
    sketches: list[engine_queries.Query]
    requests: Mapping[str, list[pb.FindInfluencesRequest]]


@asynccontextmanager
async def subject(index: Index, arguments: Mapping[str, int], server: Served) -> AsyncIterator[Subject]:
    settings = Settings()
    asked = IndexSettings(path=str(index.path), task=TASK, task_arguments=dict(arguments))
    worker, engine = ModelWorker(settings), load_engine(asked, settings)
    await engine.warm_up(worker)
    texts = synthetic_texts(NUM_QUERIES)
    examples: list[engine_queries.Query] = [
        engine_queries.ExampleQuery(text=json.dumps({"text": text}), field="queries") for text in texts
    ]
    sketched = [each.sketch for each in await engine.sketches(examples)]
    requests = {
        "example": [load_request(ExampleQuery({"text": text}), k=K) for text in texts],
        "sketch": [load_request(SketchQuery(sketch, index.fingerprint), k=K) for sketch in sketched],
    }
    async with Load(server.target, timeout_s=120) as load, grpc.aio.insecure_channel(server.target) as channel:
        blocking = grpc.insecure_channel(server.target)
        yield Subject(
            server=server,
            engine=engine,
            load=load,
            stub=AttributionStub(channel),
            blocking=AttributionStub(blocking),
            health=health_pb2_grpc.HealthStub(channel),
            examples=examples,
            sketches=[engine_queries.SketchQuery(values=sketch) for sketch in sketched],
            requests=requests,
        )
        blocking.close()
    await worker.stop()
    engine.close()


def ask_engine(engine: Engine, queries: Sequence[engine_queries.Query]) -> Awaitable[Any]:
    return engine.find_influences(
        queries, k=K, resolve="query_step", steps=None, where=None, finish=lambda answers, _: answers
    )


async def overhead(about: Subject, scale: Scale) -> None:
    """Single calls, one after another; all kinds in turns, some calls of a kind in a row.

    The first of a row are not counted: the engine and the server are processes that push each other's data out of the
    processor's caches. The 5th percentile is what calls take when nothing else runs.
    """
    calls: dict[str, Callable[[int], Any]] = {
        "a health check, gRPC alone": lambda _: about.health.Check(health_pb2.HealthCheckRequest()),
        "a sketch, the engine": lambda i: ask_engine(about.engine, [about.sketches[i]]),
        "a sketch, the service": lambda i: about.stub.FindInfluences(about.requests["sketch"][i]),
        "a sketch, the service, blocking stub": lambda i: _blocking(about.blocking, about.requests["sketch"][i]),
        "an example, the engine": lambda i: ask_engine(about.engine, [about.examples[i]]),
        "an example, the service": lambda i: about.stub.FindInfluences(about.requests["example"][i]),
    }
    durations: dict[str, list[float]] = {name: [] for name in calls}
    for first in range(0, scale.calls, IN_A_ROW):
        for name, call in calls.items():
            for turn in range(first - UNCOUNTED, first + IN_A_ROW):
                begin = time.perf_counter()
                await call(turn % NUM_QUERIES)
                if turn >= first:
                    durations[name].append(time.perf_counter() - begin)
    rows = []
    for name, times in durations.items():
        engine, added = durations.get(name.split(",")[0] + ", the engine"), ["", ""]
        if "service" in name and engine:
            added = [f"{1e3 * float(np.percentile(times, q) - np.percentile(engine, q)):.2f}" for q in (5, 50)]
        rows.append([name, *(f"{1e3 * float(np.percentile(times, q)):.2f}" for q in (5, 50, 95, 99)), *added])
    header = ["one at a time", "p5, ms", "p50, ms", "p95, ms", "p99, ms", "added at p5, ms", "added at p50, ms"]
    print(markdown_table(header, rows), flush=True)


async def _blocking(stub: AttributionStub, request: pb.FindInfluencesRequest) -> Any:
    return stub.FindInfluences(request)


async def throughput(about: Subject, scale: Scale, turns: int) -> None:
    """Example queries a second, of the engine in batches and of the service's callers."""
    rates: dict[str, list[float]] = {}
    for _ in range(turns):
        for size in ENGINE_BATCHES:
            rates.setdefault(f"engine, batches of {size}", []).append(await _batched(about, size, scale.seconds))
        for callers in CALLERS:
            measured = await about.load.closed(
                {"example": about.requests["example"]}, callers, seconds=scale.seconds, warm_up_s=scale.seconds / 5
            )
            rates.setdefault(f"service, {callers} callers", []).append(measured.throughput)
    most = max(statistics.median(each) for name, each in rates.items() if name.startswith("engine"))
    rows = [
        [name, f"{statistics.median(each):.1f}", f"{statistics.median(each) / most:.2f}"]
        for name, each in rates.items()
    ]
    print(markdown_table(["example queries", "a second", "/ the engine's most"], rows), flush=True)


async def _batched(about: Subject, size: int, seconds: float) -> float:
    count, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start = count % NUM_QUERIES
        await ask_engine(about.engine, [about.examples[(start + i) % NUM_QUERIES] for i in range(size)])
        count += size
    return count / (time.perf_counter() - begin)


async def loads(about: Subject, scale: Scale) -> float:
    """The mixed load at random times, at shares of capacity; gives the capacity."""
    capacity = (await about.load.closed(about.requests, CALLERS[-1], seconds=scale.seconds, warm_up_s=1)).throughput
    print(f"\ncapacity for the mix: {capacity:.1f} a second; the queue's promise: {PROMISE_S:g} s\n", flush=True)
    rows = []
    for share in LOADS:
        rows.append([f"{share:g} x", *await _row(about, share * capacity, scale.seconds, about.server.anonymous_mib)])
    print(markdown_table(["load", *COLUMNS], rows), flush=True)
    return capacity


COLUMNS = ("calls", "without status", "answered a second", "refused", "other", "p50, ms", "p95, ms", "p99, ms",
           "p99 waited / promise", "sent late, ms", "MiB more")  # fmt: skip


async def _row(about: Subject, rate: float, seconds: float, mib_before: float) -> list[str]:
    num_before = len(about.server.waits_s)
    measured = await about.load.open(about.requests, rate, seconds=seconds)
    codes, answered = measured.codes, measured.durations_of()
    refused = codes.get("RESOURCE_EXHAUSTED", 0)
    lost = measured.num_calls - sum(codes.values())
    others = {code: count for code, count in codes.items() if code not in (OK, "RESOURCE_EXHAUSTED")}
    waited = about.server.waits_s[num_before:]
    return [
        f"{measured.num_calls:,}",
        str(lost),
        f"{measured.throughput:.1f}",
        f"{refused / max(1, measured.num_calls):.0%}",
        json.dumps(others) if others else "0",
        *_times(answered, ("p50", "p95", "p99")),
        f"{quantiles_ms(waited)['p99'] / 1e3 / PROMISE_S:.2f}" if waited else "",
        f"{1e3 * measured.lag_s:.0f}",
        f"{about.server.anonymous_mib - mib_before:+.0f}",
    ]


async def overload(about: Subject, capacity: float, minutes: float) -> None:
    """Twice the capacity for so many minutes, a row for each."""
    rows, first = [], about.server.anonymous_mib
    spans = [60.0] * int(minutes) + [60 * (minutes % 1)] * (minutes % 1 > 0)
    for number, seconds in enumerate(spans, 1):
        rows.append([str(number), *await _row(about, 2 * capacity, seconds, first)])
    print(markdown_table(["minute at 2 x", *COLUMNS], rows), flush=True)


def _times(durations_s: Sequence[float], names: Sequence[str]) -> list[str]:
    found = quantiles_ms(durations_s)
    return [f"{found[name]:.2f}" if found else "" for name in names]


async def measure(index: Index, arguments: Mapping[str, int], server: Served, scale: Scale, given: Any) -> None:
    async with subject(index, arguments, server) as about:
        await overhead(about, scale)
        print()
        await throughput(about, scale, max(1, given.repeats // 2))
        capacity = await loads(about, scale)
        if given.minutes:
            print()
            await overload(about, capacity, given.minutes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0, help="of twice the capacity (default: none)")
    given = parse_arguments(parser)
    scale = SMOKE if given.smoke else Scale()
    arguments = {"dim": scale.dim, "count": scale.examples}
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gpt.index")
        index = build_index(
            ServedGPT(**arguments), path, SketchConfig(width=8192, bits=1), task_spec=TASK, task_arguments=arguments,
            progress=False,
        )  # fmt: skip
        with serving(path, arguments, Path(folder)) as server:
            asyncio.run(measure(index, arguments, server, scale, given))


if __name__ == "__main__":
    main()
