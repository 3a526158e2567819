"""The router's Prometheus metrics, with the names that TensorRT-LLM's disaggregated server has."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from diptych.router.snapshots import Merged, Snapshots
from diptych.router.tally import Count, Spread, Tallies
from diptych.router.worker_view import WorkerView

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)

_WRITE_S = 1.0  # between two snapshots for the other processes


class LegMetrics:
    """One role's legs."""

    def __init__(self, prefix: str, role: str, tallies: Tallies) -> None:
        def counter(name: str, text: str) -> Count:
            return tallies.count(f"{prefix}_{name}", text)

        def histogram(name: str, text: str) -> Spread:
            return tallies.spread(f"{prefix}_{name}", text, _SECONDS)

        self.total = counter("total_requests", f"Legs sent to {role} workers.")
        self.errors = counter("error_requests", f"Legs that failed on a {role} worker.")
        self.retries = counter("retry_requests", f"Legs sent again, to another {role} worker.")
        self.completed = counter("completed_requests", f"Legs that a {role} worker completed.")
        self.resumed = counter("resumed_streams", f"Streams that broke off on one {role} worker and went on.")
        self.first_token = histogram(
            "first_token_latency_seconds", f"From sending a leg to a {role} worker to its first token."
        )
        self.complete = histogram(
            "complete_latency_seconds", f"From sending a leg to a {role} worker to its last byte."
        )


class Metrics:
    """Of one process, or, with `snapshots`, of all that share a port; then use it as ``async with``."""

    def __init__(self, snapshots: Snapshots | None = None) -> None:
        self._snapshots = snapshots
        self._writer: asyncio.Task[None] | None = None
        self.registry = CollectorRegistry()
        tallies = Tallies()
        self.registry.register(tallies)

        def counter(name: str, text: str) -> Count:
            return tallies.count(name, text)

        self.requests = counter("total_requests", "Requests taken in.")
        self.stream_requests = counter("stream_requests", "Requests for a stream.")
        self.nonstream_requests = counter("nonstream_requests", "Requests for one JSON answer.")
        self.responses = counter("total_responses", "Requests answered to the end without an error.")
        self.validation_errors = counter("validation_exceptions", "Requests that were refused as invalid.")
        self.http_errors = counter("http_exceptions", "Requests that ended with an error answer.")
        self.internal_errors = counter("internal_errors", "Requests that failed by a fault of the router.")
        self.cancelled = counter("cancelled_requests", "Requests whose client went away.")
        self.released = counter("released_tickets", "Tickets returned because no generation leg took them.")
        self.queue_latency = tallies.spread(
            "queue_latency_seconds", "From a request's arrival to its first leg.", _SECONDS
        )
        self.prefix_tokens = Counter(
            "diptych_router_prefix_tokens",
            "Prompt tokens of legs that a kv_cache_aware policy placed.",
            ["leg"],
            registry=self.registry,
        )
        self.prefix_matched = Counter(
            "diptych_router_prefix_matched",
            "Those of them that are in the chosen worker's prefix cache, or on their way there.",
            ["leg"],
            registry=self.registry,
        )
        self.local_prefills = counter(
            "diptych_router_local_prefills", "Requests without a context leg: little was left to compute."
        )
        self.context = LegMetrics("ctx", "context", tallies)
        self.generation = LegMetrics("gen", "generation", tallies)

    def add_gauges(self, *collectors: Collector) -> None:
        for collector in collectors:
            self.registry.register(collector)

    async def __aenter__(self) -> "Metrics":
        if self._snapshots is not None:
            self._writer = asyncio.create_task(self._write(self._snapshots), name="metrics")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._snapshots is not None and self._writer is not None:
            self._writer.cancel()
            await asyncio.gather(self._writer, return_exceptions=True)
            self._snapshots.write(self.registry)

    def text(self) -> bytes:
        if self._snapshots is None:
            return generate_latest(self.registry)
        return generate_latest(Merged(self.registry, self._snapshots))

    async def _write(self, snapshots: Snapshots) -> None:
        while True:
            snapshots.write(self.registry)
            await asyncio.sleep(_WRITE_S)


class Gate(Protocol):
    """What admission.py can say of itself."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def refused(self) -> int: ...


class AdmissionGauges(Collector):
    def __init__(self, gate: Gate, limit: Callable[[], int]) -> None:
        self._gate = gate
        self._limit = limit

    def collect(self) -> Iterator[Metric]:
        gate = self._gate
        for name, text, value in (
            ("diptych_router_running_requests", "Requests that were let in and run now.", gate.running),
            ("diptych_router_waiting_requests", "Requests that wait to be let in.", gate.waiting),
            ("diptych_router_running_limit", "How many may run at once.", self._limit()),
        ):
            yield GaugeMetricFamily(name, text, value=value)
        yield CounterMetricFamily(
            "diptych_router_overload_refusals", "Requests refused with 429 by the router.", value=gate.refused
        )

    def describe(self) -> Iterable[Metric]:
        return ()


class Workers(Protocol):
    @property
    def workers(self) -> tuple[WorkerView, ...]: ...


class WorkerGauges(Collector):
    """Read from the pool when asked, so that they cannot be stale."""

    def __init__(self, pool: Workers) -> None:
        self._pool = pool

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ["worker", "role"]
        ready = GaugeMetricFamily("worker_ready", "1: may be given legs.", labels=labels)
        in_flight = GaugeMetricFamily("worker_in_flight", "Legs running now.", labels=labels)
        connections = GaugeMetricFamily("worker_connections", "Open connections.", labels=labels)
        for worker in self._pool.workers:
            names = [worker.worker_id, worker.info.role]
            ready.add_metric(names, float(worker.ready))
            in_flight.add_metric(names, float(worker.in_flight))
            connections.add_metric(names, float(len(worker.client.connections)))
        yield from (ready, in_flight, connections)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()
