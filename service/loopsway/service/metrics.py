"""A server's metrics for Prometheus, on an HTTP port of their own.

Labels are names that the server knows, never what a caller wrote. What can be looked up (queues, models, generations)
is looked up when somebody asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .catalog import Catalog
from .record import PartName, Record
from .version import server_version

# From a search in a small index to a sketch that waits for its model to be loaded.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # examples

_Metric = TypeVar("_Metric", Counter, Histogram)


class Metrics:
    """The metrics of one server.

    Args:
        catalog: what the server serves.

    Attributes:
        registry: that they are in.
        in_flight: requests that are being answered or wait.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.registry = registry = CollectorRegistry()
        self.in_flight = Gauge("loopsway_requests_in_flight", "Requests that run or wait.", registry=registry)

        def by_labels(
            kind: type[_Metric], name: str, text: str, *labels: str, **options: Any
        ) -> Callable[..., _Metric]:
            """A metric: gives what counts for some labels, which is looked up but once."""
            return cache(kind(name, text, labels, registry=registry, **options).labels)

        ended = ("index", "method", "code")
        self._requests = by_labels(Counter, "loopsway_requests", "Requests that came to their end.", *ended)
        self._seconds = by_labels(
            Histogram, "loopsway_request_seconds", "From a request's arrival to its encoded answer.", *ended,
            buckets=BUCKETS,
        )  # fmt: skip
        self._parts = by_labels(
            Histogram, "loopsway_part_seconds",
            "Parts of requests: waiting (queue), the model (sketch), the index (search), making the answer (encode).",
            "index", "method", "part", buckets=BUCKETS,
        )  # fmt: skip
        self._batches = by_labels(
            Counter, "loopsway_batches", "Batches of StreamInfluences that came to their end.", "index", "code"
        )
        self._queries = by_labels(
            Counter, "loopsway_queries", "Queries, or examples that were asked about.", "index", "method"
        )
        self._request_bytes = by_labels(Counter, "loopsway_request_bytes", "Bytes of requests' messages.", "method")
        self._response_bytes = by_labels(Counter, "loopsway_response_bytes", "Bytes of answers' messages.", "method")
        registry.register(_State(catalog))
        for kind in (ProcessCollector, PlatformCollector, GCCollector):
            kind(registry=registry)
        self._http: WSGIServer | None = None

    def part(self, record: Record, name: PartName, seconds: float) -> None:
        self._parts(record.index, record.method, name).observe(seconds)

    def batch(self, record: Record) -> None:
        self._batches(record.index, record.code).inc()
        self._queries(record.index, record.method).inc(record.num_queries)

    def end(self, record: Record, seconds: float) -> None:
        self._requests(record.index, record.method, record.code).inc()
        self._seconds(record.index, record.method, record.code).observe(seconds)
        if not record.num_batches:  # whose queries were counted with them
            self._queries(record.index, record.method).inc(record.num_queries)
        self._request_bytes(record.method).inc(record.request_bytes)
        self._response_bytes(record.method).inc(record.response_bytes)

    def listen(self, host: str, port: int) -> int:
        """Answers `GET /metrics` in a thread from now on; gives the port.

        Raises:
            OSError: the port can't be had.
        """
        try:
            self._http, _ = start_http_server(port, host, registry=self.registry)
        except OSError as error:
            raise OSError(f"metrics can't be had on {host}:{port}: {error.strerror}; metrics_port 0 picks a free port"
                          ) from error  # fmt: skip
        return self._http.server_port

    def close(self) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None


class _State(Collector):
    """What the server is like at the moment of asking."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def describe(self) -> Iterable[Metric]:
        return ()  # or registering it would ask the catalog

    def collect(self) -> Iterator[Metric]:
        admitted = _of_index("loopsway_requests_admitted", "Requests that an index runs or lets wait.")
        waiting = _of_index("loopsway_queries_waiting", "Queries that wait for their index's model.")
        waits = _of_index(
            "loopsway_expected_wait_seconds", "For how long a query for the model that comes now is expected to wait."
        )
        generations = _of_index("loopsway_index_generation", "The generation that an index answers from.")
        examples = _of_index("loopsway_index_examples", "Examples that an index answers from.")
        for name, engine in self._catalog.items():
            admitted.add_metric([name], engine.num_admitted)
            waiting.add_metric([name], engine.num_waiting)
            waits.add_metric([name], engine.expected_wait_s)
            generations.add_metric([name], engine.index.generation)
            examples.add_metric([name], engine.index.num_examples)
        yield from (admitted, waiting, waits, generations, examples)
        reloads = CounterMetricFamily(
            "loopsway_reloads", "New generations, by what became of them.", labels=("index", "outcome")
        )
        for (name, outcome), count in list(self._catalog.reloads.items()):
            reloads.add_metric([name, outcome], count)
        yield reloads
        info = GaugeMetricFamily("loopsway_info", "1, for the server's version.", labels=("version",))
        info.add_metric([server_version()], 1)
        yield info
        worker = self._catalog.worker
        yield _sizes(worker.batches)
        yield CounterMetricFamily(
            "loopsway_model_process_starts", "Starts of the models' process.", value=worker.num_starts
        )
        yield GaugeMetricFamily("loopsway_models_resident", "Checkpoints in memory.", value=worker.held[0])
        yield GaugeMetricFamily("loopsway_model_bytes", "Bytes of their weights.", value=worker.held[1])


def _sizes(batches: Mapping[str, Mapping[int, int]]) -> HistogramMetricFamily:
    family = HistogramMetricFamily(
        "loopsway_batch_examples", "Examples that a model sketched together, warm-ups included.", labels=("index",)
    )
    for name, counts in list(batches.items()):
        sizes = dict(counts)
        buckets = [
            (floatToGoString(most), sum(count for size, count in sizes.items() if size <= most))
            for most in (*BATCHES, math.inf)
        ]
        family.add_metric([name], buckets, sum(size * count for size, count in sizes.items()))
    return family


def _of_index(name: str, what: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, what, labels=("index",))
