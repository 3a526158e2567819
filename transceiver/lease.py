"""Leases: which blocks are held for whom, and when that ends.

Pure: the clock is passed in, nothing is sent, no block is freed here. Every lease ends exactly once, with one
reason; whoever ends it gets the `EndedLease` and returns its blocks. Expiry depends on time alone, never on
new work coming in.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

EndReason = Literal["released", "expired", "cancelled", "peer_gone"]


@dataclass(frozen=True, slots=True)
class EndedLease:
    ticket_id: str
    block_ids: tuple[int, ...]
    reason: EndReason


@dataclass(slots=True)
class _Lease:
    block_ids: tuple[int, ...]
    lease_s: float
    expires_at: float
    readers: set[int] = field(default_factory=set)


class LeaseTable:
    """`reader` is any number that names one connection of one reader."""

    def __init__(self) -> None:
        self._leases: dict[str, _Lease] = {}
        self._no_expiry_before = float("inf")

    def __len__(self) -> int:
        return len(self._leases)

    def __contains__(self, ticket_id: str) -> bool:
        return ticket_id in self._leases

    @property
    def next_expiry(self) -> float:
        """No lease ends by time before this; infinity when there is none."""
        return self._no_expiry_before

    @property
    def num_read(self) -> int:
        """Leases that some reader is reading now."""
        return sum(bool(lease.readers) for lease in self._leases.values())

    def held_blocks(self) -> list[int]:
        return [block for lease in self._leases.values() for block in lease.block_ids]

    def add(self, ticket_id: str, block_ids: Iterable[int], now: float, lease_s: float) -> None:
        assert ticket_id not in self._leases, f"lease {ticket_id} is open already"
        self._leases[ticket_id] = _Lease(tuple(block_ids), lease_s, now + lease_s)
        self._no_expiry_before = min(self._no_expiry_before, now + lease_s)

    def renew(self, ticket_id: str, now: float) -> bool:
        """False when the lease has ended."""
        lease = self._leases.get(ticket_id)
        if lease is None:
            return False
        lease.expires_at = max(lease.expires_at, now + lease.lease_s)
        return True

    def begin(self, ticket_id: str, reader: int, now: float) -> bool:
        """A reader starts to read: its death ends the lease from here on."""
        if not self.renew(ticket_id, now):
            return False
        self._leases[ticket_id].readers.add(reader)
        return True

    def release(self, ticket_id: str) -> EndedLease | None:
        """A reader has all it wants."""
        return self._end(ticket_id, "released")

    def cancel(self, ticket_id: str) -> EndedLease | None:
        """Nobody will come."""
        return self._end(ticket_id, "cancelled")

    def give_up(self, ticket_id: str, reader: int) -> EndedLease | None:
        """A reader stops without the blocks; the lease ends unless another one is reading."""
        lease = self._leases.get(ticket_id)
        if lease is None:
            return None
        lease.readers.discard(reader)
        return None if lease.readers else self._end(ticket_id, "released")

    def lose(self, reader: int) -> list[EndedLease]:
        """A reader is gone: end what it alone was reading."""
        lost = []
        for ticket_id, lease in self._leases.items():
            if reader in lease.readers:
                lease.readers.discard(reader)
                if not lease.readers:
                    lost.append(ticket_id)
        return [ended for ticket_id in lost if (ended := self._end(ticket_id, "peer_gone"))]

    def expire(self, now: float) -> list[EndedLease]:
        if now < self._no_expiry_before:
            return []
        due = [ticket_id for ticket_id, lease in self._leases.items() if lease.expires_at <= now]
        ended = [lease for ticket_id in due if (lease := self._end(ticket_id, "expired"))]
        self._no_expiry_before = min(
            (lease.expires_at for lease in self._leases.values()), default=float("inf")
        )
        return ended

    def _end(self, ticket_id: str, reason: EndReason) -> EndedLease | None:
        lease = self._leases.pop(ticket_id, None)
        return None if lease is None else EndedLease(ticket_id, lease.block_ids, reason)
