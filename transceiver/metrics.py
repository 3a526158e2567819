"""What a transceiver counts, for /metrics."""

from collections import Counter
from dataclasses import dataclass, field

from diptych.transceiver.settings import FetchDone, FetchFailed, LeaseEnded
from diptych.wire import LinkStats


@dataclass(frozen=True, slots=True, kw_only=True)
class TransceiverMetrics:
    """Totals since the start, except those that say `open`."""

    fetches: int = 0  # that ended well
    bytes: int = 0
    wire_s: float = 0.0
    total_s: float = 0.0
    fetches_by_transport: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)  # by code
    open_fetches: int = 0
    queued_fetches: int = 0  # those of them that have not begun
    open_leases: int = 0
    open_leases_read: int = 0  # those that a reader has begun to read
    leases_ended: dict[str, int] = field(default_factory=dict)  # by reason
    links: list[LinkStats] = field(default_factory=list)


@dataclass(slots=True)
class Counts:
    """The running totals. Its owner brings the lock."""

    bytes: int = 0
    wire_s: float = 0.0
    total_s: float = 0.0
    by_transport: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    leases_ended: Counter[str] = field(default_factory=Counter)

    def add(self, event: FetchDone | FetchFailed | LeaseEnded) -> None:
        if isinstance(event, FetchDone):
            self.bytes += event.bytes
            self.wire_s += event.wire_s
            self.total_s += event.total_s
            self.by_transport[event.transport] += 1
        elif isinstance(event, FetchFailed):
            self.failures[event.code] += 1
        else:
            self.leases_ended[event.reason] += 1

    def snapshot(
        self,
        *,
        open_fetches: int,
        queued_fetches: int,
        open_leases: int,
        open_leases_read: int,
        links: list[LinkStats],
    ) -> TransceiverMetrics:
        return TransceiverMetrics(
            fetches=self.by_transport.total(),
            bytes=self.bytes,
            wire_s=self.wire_s,
            total_s=self.total_s,
            fetches_by_transport=dict(self.by_transport),
            failures=dict(self.failures),
            open_fetches=open_fetches,
            queued_fetches=queued_fetches,
            open_leases=open_leases,
            open_leases_read=open_leases_read,
            leases_ended=dict(self.leases_ended),
            links=links,
        )
