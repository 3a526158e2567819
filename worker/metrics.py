"""The worker's Prometheus metrics, under the names that TensorRT-LLM's and vLLM's dashboards and routers read."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from diptych.wire import EngineReady, EngineStats
from diptych.worker.link_metrics import link_metrics
from diptych.worker.triton_metrics import triton_text

_LATENCY_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)


class WorkerMetrics:
    def __init__(
        self, model: str, stats: Callable[[], EngineStats], ready: Callable[[], EngineReady | None]
    ) -> None:
        self._stats = stats
        self._ready = ready
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(model, stats))
        labels = {"model_name": model}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(name, text, ["model_name"], buckets=buckets, registry=self.registry)
            return metric.labels(**labels)

        self._success = Counter(
            "trtllm_request_success",
            "Requests that ended, by reason",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._model = model
        self.time_to_first_token = histogram(
            "trtllm_time_to_first_token_seconds", "Arrival to first token", _LATENCY_BUCKETS
        )
        self.e2e_latency = histogram(
            "trtllm_e2e_request_latency_seconds", "Arrival to last token", _LATENCY_BUCKETS
        )
        self.queue_time = histogram(
            "trtllm_request_queue_time_seconds", "Arrival in the engine to first step", _LATENCY_BUCKETS
        )
        self.token_time = histogram(
            "trtllm_time_per_output_token_seconds", "Mean time between tokens of a request", _TOKEN_BUCKETS
        )

    def finished(self, reason: str) -> None:
        self._success.labels(model_name=self._model, finished_reason=reason).inc()

    def render(self) -> bytes:
        return generate_latest(self.registry) + triton_text(self._model, self._stats(), self._ready())


class _EngineCollector(Collector):
    """Reads the engine's last snapshot when it is scraped."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self._model = model
        self._stats = stats

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._stats()
        used = stats.active_blocks + stats.leased_blocks
        gauges = {
            "trtllm_num_requests_waiting": stats.waiting,
            "trtllm_num_requests_running": stats.running + stats.fetching,
            "trtllm_kv_cache_utilization": used / stats.total_blocks if stats.total_blocks else 0.0,
            "trtllm_kv_cache_hit_rate": stats.cached_tokens / stats.prompt_tokens
            if stats.prompt_tokens
            else 0.0,
            "trtllm_kv_cache_tokens_per_block": stats.tokens_per_block,
            "trtllm_kv_cache_max_blocks": stats.total_blocks,
            "diptych_kv_queued_fetches": stats.queued_fetches,
            "vllm:num_requests_waiting": stats.waiting,
            "vllm:num_requests_running": stats.running + stats.fetching,
            "vllm:kv_cache_usage_perc": used / stats.total_blocks if stats.total_blocks else 0.0,
        }
        for name, value in gauges.items():
            yield self._gauge(name, value)
        blocks = GaugeMetricFamily(
            "diptych_kv_blocks",
            "KV blocks by state; the states sum to max_blocks",
            labels=["model_name", "state"],
        )
        for state in ("free", "cached", "active", "leased"):
            blocks.add_metric([self._model, state], getattr(stats, f"{state}_blocks"))
        yield blocks
        counters = {
            "vllm:prompt_tokens": stats.prompt_tokens,
            "vllm:generation_tokens": stats.generation_tokens,
            "vllm:prefix_cache_queries": stats.prompt_tokens,
            "vllm:prefix_cache_hits": stats.cached_tokens,
            "vllm:num_preemptions": stats.preemptions,
            "diptych_kv_fetches": stats.fetches,
            "diptych_kv_fetch_bytes": stats.fetch_bytes,
            "diptych_kv_fetch_seconds": stats.fetch_s,
            "diptych_kv_leases_expired": stats.leases_expired,
            "diptych_handovers": stats.handovers,
            "diptych_kv_blocks_fetched_ahead": stats.blocks_ahead,
        }
        for name, value in counters.items():
            yield self._counter(name, value)
        failures = CounterMetricFamily(
            "diptych_kv_fetch_failures", "KV fetches that ended in a recompute", labels=["model_name", "code"]
        )
        for code, count in stats.fetch_failures.items():
            failures.add_metric([self._model, code], count)
        yield failures
        yield from link_metrics(self._model, stats.links)

    def _gauge(self, name: str, value: float) -> GaugeMetricFamily:
        metric = GaugeMetricFamily(name, name.replace("_", " "), labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric

    def _counter(self, name: str, value: float) -> CounterMetricFamily:
        metric = CounterMetricFamily(name, name.replace("_", " "), labels=["model_name"])
        metric.add_metric([self._model], value)
        return metric
