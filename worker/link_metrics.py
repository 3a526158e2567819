"""KV copies by peer and transport as Prometheus metrics."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from diptych.wire import LinkStats

_LABELS = ("model_name", "transport", "peer")
# name -> help text, value
_COUNTERS: Mapping[str, tuple[str, Callable[[LinkStats], float]]] = {
    "copies": ("KV copies that ended well", lambda link: link.copies),
    "bytes": ("Bytes of those", lambda link: link.bytes),
    "wait_seconds": ("From the fetch's begin to the copy's", lambda link: link.wait_s),
    "copy_seconds": ("Copying, and digesting what lands", lambda link: link.copy_s),
    "verify_seconds": ("From the last byte to the proof that it is right", lambda link: link.verify_s),
}
_GAUGES: Mapping[str, tuple[str, Callable[[LinkStats], float]]] = {
    "open_copies": ("KV copies that run now", lambda link: link.open),
    "gigabytes_per_second": (
        "All bytes by all seconds of copying",
        lambda link: link.bytes / link.copy_s / 1e9 if link.copy_s else 0.0,
    ),
    "probed_gigabytes_per_second": ("What the start-up measurement found", lambda link: link.probed_gb_s),
}


def link_metrics(model: str, links: Sequence[LinkStats]) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
    for name, (text, value) in _COUNTERS.items():
        counter = CounterMetricFamily(f"diptych_kv_link_{name}", text, labels=_LABELS)
        for link in links:
            counter.add_metric([model, link.transport, link.peer], value(link))
        yield counter
    for name, (text, value) in _GAUGES.items():
        gauge = GaugeMetricFamily(f"diptych_kv_link_{name}", text, labels=_LABELS)
        for link in links:
            gauge.add_metric([model, link.transport, link.peer], value(link))
        yield gauge
    failures = CounterMetricFamily(
        "diptych_kv_link_failures", "KV copies that failed", labels=(*_LABELS, "code")
    )
    for link in links:
        for code, count in link.failures.items():
            failures.add_metric([model, link.transport, link.peer, code], count)
    yield failures
