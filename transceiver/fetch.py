"""One fetch from its ticket to its event: for each rank of the owner choose a transport, copy, verify, tell it.

Runs on a background thread and may block there until the fetch's deadline. Knows transports only through
their protocol, and nothing of threads, queues or the engine that waits for the event.
"""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout
from diptych.transceiver import ticket as tickets
from diptych.transceiver.digest import LandedDigests, known_kind, require_digests, require_generations
from diptych.transceiver.frames import Begin, Finish
from diptych.transceiver.link import Link
from diptych.transceiver.meter import Meter
from diptych.transceiver.owners import Part, choose_parts
from diptych.transceiver.plan import CopyPlan, plan_copy
from diptych.transceiver.routes import Routes
from diptych.transceiver.settings import FetchDone
from diptych.transceiver.stop import Stop
from diptych.transceiver.ticket import OwnerRank, Ticket
from diptych.transceiver.transport import Transfer, Transport, Unreachable, ignore_landed

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
    begun: bool = False  # the owner has been told

    def abort(self) -> None:
        self.stop.abort()
        transfer = self.transfer
        if transfer is not None:
            transfer.abort()


@dataclass(slots=True)
class Copied:
    """What a fetch has copied so far, from all ranks together."""

    bytes: int = 0
    wire_s: float = 0.0
    transports: list[str] = field(default_factory=list)

    def add(self, name: str, transfer: Transfer) -> None:
        self.bytes += transfer.bytes
        self.wire_s += transfer.seconds
        if name not in self.transports:
            self.transports.append(name)


class Fetcher:
    """All that fetches of one transceiver share: transports, and one control link to each owner."""

    def __init__(
        self,
        layout: KvLayout,
        transports: Mapping[str, Transport],
        meter: Meter,
        *,
        verify_digest: bool,
        measure: bool,
        secret: bytes | None,
        timeout_s: float,
    ) -> None:
        self._layout = layout
        self._transports = transports
        self._verify_digest = verify_digest
        self._secret = secret
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._links: dict[tuple[str, str, int], Link] = {}
        self._meter = meter
        self._routes = Routes(transports, measure=measure, probed=meter.probed)
        self._closed = False

    def run(self, fetch: Fetch) -> FetchDone:
        """Raises TransferError; either way the copy has let go of the destination."""
        ticket = tickets.decode(fetch.ticket)
        complete = False
        copied = Copied()
        try:
            plans = [
                (rank, self._plan(fetch, ticket, rank, part)) for rank, part in self._parts(ticket.owners)
            ]
            for rank, plan in plans if fetch.destination_blocks else ():
                self._fetch(fetch, ticket, rank, plan, copied)
            complete = True
        finally:
            self._finish(fetch, ticket, complete=complete)
        return FetchDone(
            fetch.fetch_id,
            copied.bytes,
            copied.wire_s,
            time.monotonic() - fetch.started_at,
            "+".join(copied.transports),
        )

    def decline(self, fetch: Fetch) -> None:
        """It never began: tell the owner, so that it need not wait for the lease's end."""
        self._finish(fetch, tickets.decode(fetch.ticket), complete=False)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            links = list(self._links.values())
        flush = Stop(_FLUSH_S)
        for link in links:
            link.start_closing()
        for link in links:
            link.close(flush)
        self._routes.close()

    def _parts(self, owners: Sequence[OwnerRank]) -> list[tuple[OwnerRank, Part | None]]:
        """What to take from which rank; None: all of it, as it is."""
        for rank in owners:
            if rank.layout == self._layout:
                return [(rank, None)]
        parts = choose_parts([rank.layout for rank in owners], self._layout)
        return [(owners[part.owner], part) for part in parts]

    def _plan(self, fetch: Fetch, ticket: Ticket, rank: OwnerRank, part: Part | None) -> CopyPlan:
        return plan_copy(
            rank.layout,
            self._layout,
            ticket.block_ids,
            fetch.source_indices,
            fetch.destination_blocks,
            num_tokens=ticket.num_tokens,
            part=part,
        )

    def _fetch(self, fetch: Fetch, ticket: Ticket, rank: OwnerRank, plan: CopyPlan, copied: Copied) -> None:
        failures: list[TransferError] = []
        reasons: list[str] = []
        for name in self._routes.order(rank):
            fetch.stop.check()
            try:
                transfer = self._copy(fetch, ticket, rank, plan, self._transports[name], reasons)
            except Unreachable as error:
                reasons.append(f"{name}: {error.reason}")
                self._routes.detour(rank, name, error)
            except TransferError as error:
                # What a transport could not do, the next one may; doubt about the bytes is final.
                if error.code != "peer_gone":
                    raise
                reasons.append(f"{name}: {error.message}")
                failures.append(error)
            else:
                copied.add(name, transfer)
                return
        raise TransferError(
            f"no transport reaches {rank.host}:{rank.port}: {'; '.join(reasons) or 'none in common'}",
            code=failures[-1].code if failures else "peer_gone",
        )

    def _copy(
        self,
        fetch: Fetch,
        ticket: Ticket,
        rank: OwnerRank,
        plan: CopyPlan,
        transport: Transport,
        reasons: Sequence[str],
    ) -> Transfer:
        peer = transport.connect(rank.transports[transport.name], fetch.stop)
        kind = known_kind(rank.digest_kind) if self._verify_digest and rank.digests else None
        on_host = LandedDigests(kind, plan.source_block_bytes) if kind and plan.whole_blocks else None
        landed = on_host.landed if on_host else ignore_landed
        transfer = transport.start(peer, plan, fetch.stop, landed, kind)
        self._routes.use(rank, transport.name, peer.reason, reasons)
        fetch.transfer = transfer
        # Only now: the thread that tells the owner would hold up the start of a copy.
        self._begin(fetch, ticket)
        with self._meter.copying(rank, transport.name, transfer, fetch.started_at):
            try:
                transfer.wait()
            finally:
                fetch.transfer = None
            require_generations(transfer.generations, [ticket.generations[i] for i in plan.positions])
            found = transfer.digests
            if found is None and on_host is not None:
                found = on_host.of(plan.destination_blocks)
            if kind is not None and found is not None:
                require_digests(found, [rank.digests[i] for i in plan.positions], plan.complete)
        return transfer

    def _begin(self, fetch: Fetch, ticket: Ticket) -> None:
        """Every rank of the owner is told, once, also those that this reader takes nothing from."""
        if not fetch.begun:
            fetch.begun = True
            for rank in _leasing(ticket):
                self._tell(rank, ticket.lease_s, Begin(rank.ticket_id))

    def _finish(self, fetch: Fetch, ticket: Ticket, *, complete: bool) -> None:
        """Also when the link was cut meanwhile: what it had said last may never have reached the owner."""
        self._begin(fetch, ticket)
        for rank in _leasing(ticket):
            self._tell(rank, ticket.lease_s, Finish(rank.ticket_id, complete))

    def _tell(self, rank: OwnerRank, lease_s: float, message: Begin | Finish) -> None:
        for _ in range(2):  # a link that has just ended is dialled anew, once
            link = self._link(rank, lease_s)
            if link is None or link.say(message):
                return
            self._drop(link)

    def _link(self, rank: OwnerRank, lease_s: float) -> Link | None:
        key = (rank.incarnation, rank.host, rank.port)
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
        key = (link.rank.incarnation, link.rank.host, link.rank.port)
        with self._lock:
            if self._links.get(key) is not link:
                return
            del self._links[key]
        self._routes.forget(link.rank.incarnation)
        for transport in self._transports.values():
            transport.forget(link.rank.incarnation)
        for message in link.unsaid():
            self._tell(link.rank, link.lease_s, message)


def _leasing(ticket: Ticket) -> list[OwnerRank]:
    """The ranks that hold their blocks for this ticket, and want to hear of its fetch."""
    return [rank for rank in ticket.owners if rank.ticket_id]
