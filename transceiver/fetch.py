"""One fetch from its ticket to its event: choose a transport, copy, verify, tell the owner.

Runs on a background thread and may block there until the fetch's deadline. Knows transports only through
their protocol, and nothing of threads, queues or the engine that waits for the event.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout
from diptych.transceiver import ticket as tickets
from diptych.transceiver.digest import LandedDigests, require_generations
from diptych.transceiver.link import Link
from diptych.transceiver.plan import CopyPlan, plan_copy
from diptych.transceiver.pool_memory import PoolMemory
from diptych.transceiver.settings import FetchDone
from diptych.transceiver.stop import Stop
from diptych.transceiver.ticket import Ticket
from diptych.transceiver.transport import Transfer, Transport, Unreachable

log = logging.getLogger(__name__)

_FLUSH_S = 1.0  # for telling owners, at close, which tickets are done


@dataclass(slots=True, eq=False)
class Fetch:
    fetch_id: int
    ticket: bytes
    source_indices: tuple[int, ...]
    destination_blocks: tuple[int, ...]
    stop: Stop
    started_at: float = field(default_factory=time.monotonic)
    transfer: Transfer | None = None

    def abort(self) -> None:
        self.stop.abort()
        transfer = self.transfer
        if transfer is not None:
            transfer.abort()


class Fetcher:
    """All that fetches of one transceiver share: transports, and one control link to each owner."""

    def __init__(
        self,
        memory: PoolMemory,
        layout: KvLayout,
        transports: Mapping[str, Transport],
        *,
        verify_digest: bool,
        secret: bytes | None,
        timeout_s: float,
    ) -> None:
        self._memory = memory
        self._layout = layout
        self._transports = transports
        self._verify_digest = verify_digest
        self._secret = secret
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._links: dict[tuple[str, str, int], Link] = {}
        self._routes: dict[str, str] = {}  # incarnation -> transport, for one log line a peer
        self._closed = False

    def run(self, fetch: Fetch) -> FetchDone:
        """Raises TransferError; either way the copy has let go of the destination."""
        ticket = tickets.decode(fetch.ticket)
        complete = False
        link = self._begin(ticket)
        try:
            name, copied, wire_s = self._fetch(fetch, ticket)
            complete = True
        finally:
            # When the link has ended meanwhile, the lease has too: the owner is gone, or saw this reader
            # leave.
            if link is not None:
                link.finish(ticket.ticket_id, complete=complete)
        return FetchDone(fetch.fetch_id, copied, wire_s, time.monotonic() - fetch.started_at, name)

    def decline(self, ticket: bytes) -> None:
        """The fetch never began: tell the owner, so that it need not wait for the lease's end."""
        decoded = tickets.decode(ticket)
        link = self._begin(decoded)
        if link is not None:
            link.finish(decoded.ticket_id, complete=False)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            links = list(self._links.values())
        flush = Stop(_FLUSH_S)
        for link in links:
            link.start_closing()
        for link in links:
            link.close(flush)

    def _fetch(self, fetch: Fetch, ticket: Ticket) -> tuple[str, int, float]:
        plan = self._plan(fetch, ticket)
        if not fetch.destination_blocks:
            return "", 0, 0.0
        failures: list[TransferError] = []
        reasons: list[str] = []
        for name, transport in self._transports.items():
            if name not in ticket.transports:
                continue
            fetch.stop.check()
            try:
                return self._copy(fetch, ticket, plan, transport, reasons)
            except Unreachable as error:
                reasons.append(f"{name}: {error.reason}")
                if error.remedy:
                    self._log_detour(ticket, name, error.reason, error.remedy)
            except TransferError as error:
                # What a transport could not do, the next one may; doubt about the bytes is final.
                if error.code != "peer_gone":
                    raise
                reasons.append(f"{name}: {error.message}")
                failures.append(error)
        raise TransferError(
            f"no transport reaches {ticket.host}:{ticket.port}: {'; '.join(reasons) or 'none in common'}",
            code=failures[-1].code if failures else "peer_gone",
        )

    def _plan(self, fetch: Fetch, ticket: Ticket) -> CopyPlan:
        num_blocks = len(ticket.block_ids)
        if any(not 0 <= index < num_blocks for index in fetch.source_indices):
            raise TransferError(
                f"a source index lies outside the ticket's {num_blocks} blocks", code="layout"
            )
        source_blocks = [ticket.block_ids[index] for index in fetch.source_indices]
        return plan_copy(ticket.layout, self._layout, source_blocks, fetch.destination_blocks)

    def _copy(
        self, fetch: Fetch, ticket: Ticket, plan: CopyPlan, transport: Transport, reasons: Sequence[str]
    ) -> tuple[str, int, float]:
        peer = transport.connect(ticket.transports[transport.name], fetch.stop)
        self._log_route(ticket, transport.name, peer.reason, reasons)
        verify = self._verify_digest and bool(ticket.digests)
        digests = LandedDigests(self._memory.data, plan.block_bytes)
        landed = digests.landed if verify else _ignore
        transfer = transport.start(peer, plan, fetch.stop, landed)
        fetch.transfer = transfer
        try:
            transfer.wait()
        finally:
            fetch.transfer = None
        require_generations(transfer.generations, [ticket.generations[i] for i in fetch.source_indices])
        if verify:
            digests.require(plan.destination_blocks, [ticket.digests[i] for i in fetch.source_indices])
        return transport.name, transfer.bytes, transfer.seconds

    def _begin(self, ticket: Ticket) -> Link | None:
        for _ in range(2):  # a link that has just ended is dialled anew, once
            link = self._link(ticket)
            if link is None or link.begin(ticket.ticket_id):
                return link
            self._drop(link)
        return None

    def _link(self, ticket: Ticket) -> Link | None:
        key = (ticket.incarnation, ticket.host, ticket.port)
        with self._lock:
            if self._closed:
                return None
            link = self._links.get(key)
            if link is None:
                link = self._links[key] = Link(
                    ticket, secret=self._secret, timeout_s=self._timeout_s, gone=self._drop
                )
            return link

    def _drop(self, link: Link) -> None:
        key = (link.incarnation, *link.address)
        with self._lock:
            if self._links.get(key) is not link:
                return
            del self._links[key]
            self._routes.pop(link.incarnation, None)
        for transport in self._transports.values():
            transport.forget(link.incarnation)

    def _log_route(self, ticket: Ticket, name: str, reason: str, detours: Sequence[str]) -> None:
        with self._lock:
            if self._routes.get(ticket.incarnation) == name:
                return
            self._routes[ticket.incarnation] = name
        because = "; ".join([reason, *(f"not {detour}" for detour in detours)])
        log.info("KV transport to %s:%d = %s, because %s", ticket.host, ticket.port, name, because)

    def _log_detour(self, ticket: Ticket, name: str, reason: str, remedy: str) -> None:
        with self._lock:
            if ticket.incarnation in self._routes:
                return
        log.warning(
            "KV transport to %s:%d cannot be %s: %s; to use it, %s",
            ticket.host,
            ticket.port,
            name,
            reason,
            remedy,
        )


def _ignore(offset: int, length: int) -> None:
    """Digests are not wanted."""
