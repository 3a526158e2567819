"""Counters and histograms that cost next to nothing to count with: plain numbers, formatted only when asked.

For one thread. What they collect to is prometheus_client's.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector


class Count:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self.value += amount


class Spread:
    """How often a value was in which range."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Tallies(Collector):
    def __init__(self) -> None:
        self._counts: list[tuple[str, str, Count]] = []
        self._spreads: list[tuple[str, str, Spread]] = []

    def count(self, name: str, text: str) -> Count:
        self._counts.append((name, text, Count()))
        return self._counts[-1][2]

    def spread(self, name: str, text: str, bounds: Sequence[float]) -> Spread:
        self._spreads.append((name, text, Spread(bounds)))
        return self._spreads[-1][2]

    def collect(self) -> Iterator[Metric]:
        for name, text, count in self._counts:
            yield CounterMetricFamily(name, text, value=count.value)
        for name, text, spread in self._spreads:
            yield HistogramMetricFamily(name, text, buckets=_cumulative(spread), sum_value=spread.sum)

    def describe(self) -> Iterable[Metric]:
        return ()


def _cumulative(spread: Spread) -> list[tuple[str, float]]:
    total = 0.0
    buckets = []
    for bound, count in zip((*map(str, spread.bounds), "+Inf"), spread.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets
