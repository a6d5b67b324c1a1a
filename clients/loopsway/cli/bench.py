"""`loopsway bench`: puts load on a running server, and shows how long its answers took and what it refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .connection import Connection, connection_options
from .failure import needs
from .query import json_value, npy_array
from .query_sets import FILE, TOGETHER

if TYPE_CHECKING:
    from loopsway.client import IndexInfo, Query
    from loopsway.client.load import Measurement

QUANTILES = {"p50": 50, "p95": 95, "p99": 99, "max": 100}


@click.command(short_help="Put load on a server, and measure its answers.")
@connection_options
@click.option("--index", default="", metavar="NAME", help="Which of its indices, when it serves several.")
@click.option("--queries", type=FILE, metavar="FILE.jsonl", help="Ask about examples, one on each line.")
@click.option("--ids", metavar="ID[,ID...]", help="Ask about indexed examples.")
@click.option(
    "--sketches", type=FILE, metavar="FILE.npy", help="Ask about sketches: [queries, steps, width], --fingerprint."
)
@click.option("--fingerprint", metavar="HEX", help="Of the sketcher that made the sketches.")
@click.option("--k", default=10, show_default=True, help="Proponents, and opponents, in each ranking.")
@click.option("--concurrency", type=click.IntRange(min=1), metavar="N", help="Callers that wait for their answers.")
@click.option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="R",
    help="Calls a second at random times, whether answered or not, instead of --concurrency.",
)
@click.option("--duration", default=10.0, show_default=True, help="Seconds in which calls begin.")
@click.option("--warm-up", default=2.0, show_default=True, help="Seconds of calls before, which don't count.")
@click.option("--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds, each call's deadline.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, and nothing else.")
def bench(
    connection: Connection,
    index: str,
    queries: Path | None,
    ids: str | None,
    sketches: Path | None,
    fingerprint: str | None,
    k: int,
    concurrency: int | None,
    rate: float | None,
    duration: float,
    warm_up: float,
    timeout_s: float,
    as_json: bool,
) -> None:
    """Measures a server under load: how long answers take, how many come a second, and what is refused.

    With --concurrency N (default: 1), N callers ask again as soon as they are answered. With --rate R, calls begin at
    random times, R a second, as from many callers that don't wait for each other, and durations are from when a call
    was meant to begin. Every call is sent once. Of several kinds of queries, each is asked equally often.
    """
    if concurrency is not None and rate is not None:
        raise click.UsageError("--concurrency and --rate are two ways of asking: give one")
    asked = _asked(queries, ids, sketches, fingerprint)
    facts, measured = asyncio.run(
        _measured(connection, asked, k, index, concurrency or 1, rate, duration, warm_up, timeout_s)
    )
    document = {
        "server": connection.server,
        "index": facts.name,
        "examples": facts.num_examples,
        "steps": facts.num_steps,
        **({"concurrency": concurrency or 1} if rate is None else {"rate": rate}),
        **summary(measured),
    }
    if as_json:
        click.echo(json.dumps(document, indent=2))
    else:
        _show(document)


def summary(measured: Measurement) -> dict[str, Any]:
    """What was measured, ready for JSON: times in milliseconds, those of answers and of each kind and status."""
    return {
        "seconds": round(measured.seconds, 3),
        "calls": measured.num_calls,
        "codes": measured.codes,
        "throughput": round(measured.throughput, 2),
        "lag_ms": round(1e3 * measured.lag_s, 3),
        "latency_ms": quantiles_ms(measured.durations_of()),
        "kinds": [
            {"kind": kind, "code": code, "calls": len(durations), "latency_ms": quantiles_ms(durations)}
            for (kind, code), durations in sorted(measured.durations_s.items())
        ],
    }


def quantiles_ms(durations_s: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 and the most; empty without durations."""
    import numpy as np

    if not len(durations_s):
        return {}
    values = np.percentile(np.asarray(durations_s), list(QUANTILES.values()))
    return {name: round(1e3 * float(value), 3) for name, value in zip(QUANTILES, values, strict=True)}


async def _measured(
    connection: Connection,
    asked: dict[str, list[Query]],
    k: int,
    index: str,
    concurrency: int,
    rate: float | None,
    duration: float,
    warm_up: float,
    timeout_s: float,
) -> tuple[IndexInfo, Measurement]:
    from loopsway.client import LoopswayError
    from loopsway.client.load import load_request

    try:
        async with connection.async_client(timeout_s) as client:
            facts = await client.get_index(index)
            requests = {kind: [load_request(each, k=k, index=facts.name) for each in of] for kind, of in asked.items()}
            await client.find_influences([of[0] for of in asked.values()], k=k, index=facts.name)  # refused: says why
    except LoopswayError as error:
        raise click.ClickException(str(error)) from error
    async with connection.load(timeout_s) as load:
        if rate is None:
            return facts, await load.closed(requests, concurrency, seconds=duration, warm_up_s=warm_up)
        return facts, await load.open(requests, rate, seconds=duration, warm_up_s=warm_up)


def _asked(
    queries: Path | None, ids: str | None, sketches: Path | None, fingerprint: str | None
) -> dict[str, list[Query]]:
    """The queries by their kind, each with one or more."""
    from loopsway.client import ExampleQuery, IdQuery, SketchQuery

    if (sketches is None) != (fingerprint is None):
        raise click.UsageError(TOGETHER)
    asked: dict[str, list[Query]] = {}
    if queries is not None:
        lines = [line for line in queries.read_text(encoding="utf-8").splitlines() if line.strip()]
        asked["example"] = [ExampleQuery(json_value(line, f"{queries}:")) for line in lines]
    if ids is not None:
        asked["id"] = [IdQuery(each) for each in ids.split(",") if each]
    if sketches is not None and fingerprint is not None:
        values = npy_array(sketches, "--sketches")
        asked["sketch"] = [SketchQuery(each, fingerprint) for each in (values if values.ndim > 2 else values[None])]
    if not asked or not all(asked.values()):
        raise click.UsageError("name one or more queries, by --queries FILE.jsonl, --ids or --sketches FILE.npy")
    return asked


def _show(document: dict[str, Any]) -> None:
    with needs("printing tables needs the command's extra", "cli"):
        from rich.console import Console

        from .tables import listing, pairs
    console = Console()
    way = f"{document['rate']:g} calls a second" if "rate" in document else f"{document['concurrency']} at once"
    facts = {
        "index": f"{document['index']} at {document['server']}: {document['examples']:,} examples, "
        f"{document['steps']} steps",
        "load": f"{document['calls']:,} calls in {document['seconds']:.1f} s, {way}",
        "answered": f"{document['throughput']:.1f} a second",
        "sent late": f"by {document['lag_ms']:.1f} ms at the most" if "rate" in document else "",
    }
    console.print(pairs({name: text for name, text in facts.items() if text}))
    table = listing(["query", "status", "calls", *(f"{name} ms" for name in QUANTILES)], text=["query", "status"])
    for row in document["kinds"]:
        times = (f"{row['latency_ms'][name]:.1f}" for name in QUANTILES)
        table.add_row(row["kind"], row["code"], f"{row['calls']:,}", *times)
    console.print()
    console.print(table)
