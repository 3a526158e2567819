"""The prefix index as Prometheus sees it; read when asked, so that it cannot be stale."""

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from diptych.router.prefix_follow import PrefixFollower
from diptych.router.prefix_index import PrefixIndex


class PrefixCollector(Collector):
    def __init__(self, index: PrefixIndex, follower: PrefixFollower) -> None:
        self._index = index
        self._follower = follower

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        labels = ["worker"]
        blocks = GaugeMetricFamily(
            "diptych_router_prefix_index_blocks", "Blocks known to be in the worker's cache.", labels=labels
        )
        synced = GaugeMetricFamily(
            "diptych_router_prefix_synced", "1: the worker's events come without a gap.", labels=labels
        )
        lag = GaugeMetricFamily(
            "diptych_router_prefix_event_lag_seconds",
            "Age of the oldest change in the last answer, when the worker sent it.",
            labels=labels,
        )
        resyncs = CounterMetricFamily(
            "diptych_router_prefix_resyncs", "Times that all blocks were asked for.", labels=labels
        )
        for worker_id, state in self._follower.followed.items():
            blocks.add_metric([worker_id], self._index.size(worker_id))
            synced.add_metric([worker_id], float(state.is_current))
            lag.add_metric([worker_id], state.lag_s)
            resyncs.add_metric([worker_id], state.resyncs)
        yield from (blocks, synced, lag, resyncs)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()
