"""What a reader tells the owners of tickets: that it begins, and that it has ended. One control link for each rank."""

import threading
from collections.abc import Callable

from diptych.transceiver.frames import Begin, Finish
from diptych.transceiver.link import Link
from diptych.transceiver.stop import Stop
from diptych.transceiver.ticket import OwnerRank, Ticket

_FLUSH_S = 1.0  # for telling owners, at close, which tickets are done


class OwnerLinks:
    def __init__(self, *, secret: bytes | None, timeout_s: float, lost: Callable[[str], None]) -> None:
        """`lost` gets the incarnations of ranks whose owner is gone."""
        self._secret = secret
        self._timeout_s = timeout_s
        self._lost = lost
        self._lock = threading.Lock()
        self._links: dict[tuple[str, str, int], Link] = {}
        self._pools: dict[str, set[str]] = {}  # by the rank that has a link: itself, and ranks without one
        self._closed = False

    def begin(self, ticket: Ticket) -> None:
        """Every rank of the owner is told, also those that this reader takes nothing from."""
        for rank in _leasing(ticket):
            with self._lock:
                pools = self._pools.setdefault(rank.incarnation, {rank.incarnation})
                pools.update(owner.incarnation for owner in ticket.owners if not owner.ticket_id)
            self._tell(rank, ticket.lease_s, Begin(rank.ticket_id))

    def finish(self, ticket: Ticket, *, complete: bool) -> None:
        for rank in _leasing(ticket):
            self._tell(rank, ticket.lease_s, Finish(rank.ticket_id, complete))

    def reach(self, ticket: Ticket) -> bool:
        """Whether the ticket's owner hears what it is told."""
        with self._lock:
            links = [self._links.get(_key(rank)) for rank in _leasing(ticket)]
        return all(link is not None and link.is_up for link in links)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            links = list(self._links.values())
        flush = Stop(_FLUSH_S)
        for link in links:
            link.start_closing()
        for link in links:
            link.close(flush)

    def _tell(self, rank: OwnerRank, lease_s: float, message: Begin | Finish) -> None:
        for _ in range(2):  # a link that has just ended is dialled anew, once
            link = self._link(rank, lease_s)
            if link is None or link.say(message):
                return
            self._drop(link)

    def _link(self, rank: OwnerRank, lease_s: float) -> Link | None:
        key = _key(rank)
        with self._lock:
            if self._closed:
                return None
            link = self._links.get(key)
            if link is None:
                link = self._links[key] = Link(
                    rank, lease_s=lease_s, secret=self._secret, timeout_s=self._timeout_s, gone=self._drop
                )
            return link

    def _drop(self, link: Link) -> None:
        key = _key(link.rank)
        with self._lock:
            if self._links.get(key) is not link:
                return
            del self._links[key]
            ranks = self._pools.pop(link.rank.incarnation, {link.rank.incarnation})
        for incarnation in ranks:
            self._lost(incarnation)
        for message in link.unsaid():
            self._tell(link.rank, link.lease_s, message)


def _key(rank: OwnerRank) -> tuple[str, str, int]:
    return rank.incarnation, rank.host, rank.port


def _leasing(ticket: Ticket) -> list[OwnerRank]:
    """The ranks that hold their blocks for this ticket, and want to hear of its fetch."""
    return [rank for rank in ticket.owners if rank.ticket_id]
