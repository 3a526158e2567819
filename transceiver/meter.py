"""Counts copies by owner and transport, for /metrics. Knows nothing of what a transport does."""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from diptych.errors import TransferError
from diptych.transceiver.ticket import OwnerRank
from diptych.transceiver.transport import Transfer
from diptych.wire import LinkStats

_MAX_LINKS = 128  # owners come and go: those that were used last


@dataclass(slots=True)
class _Totals:
    copies: int = 0
    bytes: int = 0
    wait_s: float = 0.0
    copy_s: float = 0.0
    verify_s: float = 0.0
    open: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    probed_gb_s: float = 0.0


class Meter:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._links: OrderedDict[tuple[str, str], _Totals] = OrderedDict()  # by peer and transport

    @contextmanager
    def copying(
        self, owner: OwnerRank, transport: str, transfer: Transfer, asked_at: float
    ) -> Iterator[None]:
        """Around one transfer that has started, until its bytes are verified.

        `asked_at`: when its fetch was asked for (time.monotonic()).
        """
        started_at = time.monotonic()
        with self._lock:
            totals = self._of(owner, transport)
            totals.open += 1
        failure: str | None = "internal"
        try:
            yield
            failure = None
        except TransferError as error:
            failure = error.code or failure
            raise
        finally:
            elapsed_s = time.monotonic() - started_at
            with self._lock:
                totals.open -= 1
                if failure is not None:
                    totals.failures[failure] += 1
                else:
                    totals.copies += 1
                    totals.bytes += transfer.bytes
                    totals.wait_s += started_at - asked_at
                    totals.copy_s += transfer.seconds
                    totals.verify_s += max(0.0, elapsed_s - transfer.seconds)

    def probed(self, owner: OwnerRank, transport: str, gb_s: float) -> None:
        """What the measurement of this way found."""
        with self._lock:
            self._of(owner, transport).probed_gb_s = gb_s

    def links(self) -> list[LinkStats]:
        with self._lock:
            return [
                LinkStats(
                    peer=peer,
                    transport=transport,
                    copies=totals.copies,
                    bytes=totals.bytes,
                    wait_s=totals.wait_s,
                    copy_s=totals.copy_s,
                    verify_s=totals.verify_s,
                    open=totals.open,
                    failures=dict(totals.failures),
                    probed_gb_s=totals.probed_gb_s,
                )
                for (peer, transport), totals in self._links.items()
            ]

    def _of(self, owner: OwnerRank, transport: str) -> _Totals:
        key = (f"{owner.host}:{owner.port}", transport)
        totals = self._links.setdefault(key, _Totals())
        self._links.move_to_end(key)
        if len(self._links) > _MAX_LINKS:
            self._links.popitem(last=False)
        return totals
