"""The router's Prometheus metrics, with the names that TensorRT-LLM's disaggregated server has."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from diptych.router.pool import WorkerView

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0)


class LegMetrics:
    """One role's legs."""

    def __init__(self, prefix: str, role: str, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str) -> Counter:
            return Counter(f"{prefix}_{name}", text, registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"{prefix}_{name}", text, registry=registry, buckets=_SECONDS)

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
    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, registry=self.registry)

        self.requests = counter("total_requests", "Requests taken in.")
        self.stream_requests = counter("stream_requests", "Requests for a stream.")
        self.nonstream_requests = counter("nonstream_requests", "Requests for one JSON answer.")
        self.responses = counter("total_responses", "Requests answered to the end without an error.")
        self.validation_errors = counter("validation_exceptions", "Requests that were refused as invalid.")
        self.http_errors = counter("http_exceptions", "Requests that ended with an error answer.")
        self.internal_errors = counter("internal_errors", "Requests that failed by a fault of the router.")
        self.cancelled = counter("cancelled_requests", "Requests whose client went away.")
        self.released = counter("released_tickets", "Tickets returned because no generation leg took them.")
        self.queue_latency = Histogram(
            "queue_latency_seconds",
            "From a request's arrival to its first leg.",
            registry=self.registry,
            buckets=_SECONDS,
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
        self.context = LegMetrics("ctx", "context", self.registry)
        self.generation = LegMetrics("gen", "generation", self.registry)

    def text(self) -> bytes:
        return generate_latest(self.registry)


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
