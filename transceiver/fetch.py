"""One fetch from its ticket to its event: for each rank of the owner choose a transport, copy, verify, tell it.

The copies from all ranks are started before the first one is waited for.

Runs on a background thread and may block there until the fetch's deadline. Knows transports only through
their protocol, and nothing of threads, queues or the engine that waits for the event.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout
from diptych.transceiver import ticket as tickets
from diptych.transceiver.companions import NOTHING_TO_FETCH, CompanionFetch, Companions
from diptych.transceiver.digest import LandedDigests, known_kind, require_digests, require_generations
from diptych.transceiver.meter import Meter
from diptych.transceiver.owner_links import OwnerLinks
from diptych.transceiver.owners import Part, choose_parts
from diptych.transceiver.plan import CopyPlan, plan_copy
from diptych.transceiver.pool import DigestKind
from diptych.transceiver.routes import Routes
from diptych.transceiver.settings import FetchDone
from diptych.transceiver.stop import Stop
from diptych.transceiver.ticket import OwnerRank, Ticket
from diptych.transceiver.transport import Transfer, Transport, Unreachable, ignore_landed


@dataclass(slots=True, eq=False)
class Fetch:
    fetch_id: int
    ticket: bytes
    source_indices: tuple[int, ...]
    destination_blocks: tuple[int, ...]
    stop: Stop
    started_at: float = field(default_factory=time.monotonic)
    begun: bool = False  # the owner has been told
    others: CompanionFetch = NOTHING_TO_FETCH  # what the other ranks of our engine do of it
    lingering: list[Transfer] = field(default_factory=list)  # may still write to the destination

    def abort(self) -> None:
        """Every copy of it looks at the stop."""
        self.stop.abort()
        self.others.abort()


@dataclass(slots=True, eq=False)
class _Copy:
    """One rank's part of a fetch. `transfer` is there from its start until it has been waited for."""

    rank: OwnerRank
    plan: CopyPlan
    untried: Iterator[str]  # transports
    name: str = ""
    transfer: Transfer | None = None
    kind: DigestKind | None = None
    on_host: LandedDigests | None = None
    began_at: float = math.inf  # copying
    ended_at: float = 0.0
    reasons: list[str] = field(default_factory=list)  # why others than `name` do not serve
    failures: list[TransferError] = field(default_factory=list)

    def note(self, error: TransferError) -> None:
        """What a transport could not do, the next one may; doubt about the bytes is final."""
        if error.code != "peer_gone":
            raise error
        self.reasons.append(f"{self.name}: {error.message}")
        self.failures.append(error)


class Fetcher:
    """All that fetches of one transceiver share: transports, and links to owners."""

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
        companions: Companions,
    ) -> None:
        self._layout = layout
        self._companions = companions
        self._transports = transports
        self._verify_digest = verify_digest
        self._links = OwnerLinks(secret=secret, timeout_s=timeout_s, lost=self._lost)
        self._meter = meter
        self._routes = Routes(transports, measure=measure, probed=meter.probed)

    def run(self, fetch: Fetch) -> FetchDone:
        """Raises TransferError; either way the copy has let go of the destination, but for `fetch.lingering`."""
        ticket = tickets.decode(fetch.ticket)
        complete = False
        try:
            copies, wire_s = self._copy_ours(fetch, ticket)
            num_bytes = sum(copy.plan.num_bytes for copy in copies) + fetch.others.join()
            complete = True
        finally:
            self._finish(fetch, ticket, complete=complete)
        return FetchDone(
            fetch.fetch_id,
            num_bytes,
            wire_s,
            time.monotonic() - fetch.started_at,
            "+".join(dict.fromkeys(copy.name for copy in copies)),
            told=num_bytes > 0 or self._links.reach(ticket),
        )

    def _copy_ours(self, fetch: Fetch, ticket: Ticket) -> tuple[list[_Copy], float]:
        """This rank's part, and how long it took to copy; the other ranks have begun with theirs."""
        copies: list[_Copy] = []
        try:
            plans = [
                (rank, self._plan(fetch, ticket, rank, part)) for rank, part in self._parts(ticket.owners)
            ]
            if fetch.destination_blocks:
                self._start_others(fetch, ticket)
                copies = [_Copy(rank, plan, iter(self._routes.order(rank))) for rank, plan in plans]
            return copies, self._copy_all(fetch, ticket, copies)
        except BaseException:
            _let_others_go(fetch)
            raise

    def _start_others(self, fetch: Fetch, ticket: Ticket) -> None:
        fetch.others = self._companions.fetch(ticket, fetch.source_indices, fetch.destination_blocks)
        fetch.stop.check()  # an abort until now did not reach them

    def decline(self, fetch: Fetch) -> None:
        """It never began: tell the owner, so that it need not wait for the lease's end."""
        self._finish(fetch, tickets.decode(fetch.ticket), complete=False)

    def forget(self, incarnation: str) -> None:
        """Let go of the memory of an owner's rank that is gone."""
        self._routes.forget(incarnation)
        for transport in self._transports.values():
            transport.forget(incarnation)

    def close(self) -> None:
        self._links.close()
        self._routes.close()

    def _lost(self, incarnation: str) -> None:
        self.forget(incarnation)
        self._companions.forget(incarnation)

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

    def _copy_all(self, fetch: Fetch, ticket: Ticket, copies: Sequence[_Copy]) -> float:
        """Seconds from the first copy's start to the last one's end."""
        try:
            for copy in copies:
                self._start(fetch, copy)
            # Only now: the thread that tells the owner would hold up the start of a copy.
            self._begin(fetch, ticket)
            for copy in copies:
                self._complete(fetch, ticket, copy)
        finally:
            for copy in copies:
                _let_go(fetch, copy)
        if not copies:
            return 0.0
        return max(copy.ended_at for copy in copies) - min(copy.began_at for copy in copies)

    def _start(self, fetch: Fetch, copy: _Copy) -> None:
        """By the next transport that reaches the owner."""
        rank = copy.rank
        for name in copy.untried:
            fetch.stop.check()
            copy.name = name
            try:
                self._start_by(self._transports[name], fetch, copy)
            except Unreachable as error:
                copy.reasons.append(f"{name}: {error.reason}")
                self._routes.detour(rank, name, error)
            except TransferError as error:
                copy.note(error)
            else:
                return
        raise TransferError(
            f"no transport reaches {rank.host}:{rank.port}: {'; '.join(copy.reasons) or 'none in common'}",
            code=copy.failures[-1].code if copy.failures else "peer_gone",
        )

    def _start_by(self, transport: Transport, fetch: Fetch, copy: _Copy) -> None:
        rank, plan = copy.rank, copy.plan
        peer = transport.connect(rank.transports[transport.name], fetch.stop)
        kind = known_kind(rank.digest_kind) if self._verify_digest and rank.digests else None
        copy.kind = kind
        copy.on_host = LandedDigests(kind, plan.source_block_bytes) if kind and plan.whole_blocks else None
        landed = copy.on_host.landed if copy.on_host else ignore_landed
        copy.transfer = transport.start(peer, plan, fetch.stop, landed, kind)
        self._routes.use(rank, transport.name, peer.reason, copy.reasons)

    def _complete(self, fetch: Fetch, ticket: Ticket, copy: _Copy) -> None:
        """Waits and verifies; what fails by its transport is started anew by the next one."""
        while True:
            transfer, copy.transfer = copy.transfer, None
            assert transfer is not None
            try:
                with self._meter.copying(copy.rank, copy.name, transfer, fetch.started_at):
                    transfer.wait()
                    copy.ended_at = time.monotonic()
                    copy.began_at = copy.ended_at - transfer.seconds
                    _verify(ticket, copy, transfer)
            except TransferError as error:
                if transfer.lingers:  # nobody else may write there
                    fetch.lingering.append(transfer)
                    raise
                copy.note(error)
                self._start(fetch, copy)
            else:
                return

    def _begin(self, fetch: Fetch, ticket: Ticket) -> None:
        if not fetch.begun:
            fetch.begun = True
            self._links.begin(ticket)

    def _finish(self, fetch: Fetch, ticket: Ticket, *, complete: bool) -> None:
        """Also when the link was cut meanwhile: what it had said last may never have reached the owner."""
        self._begin(fetch, ticket)
        self._links.finish(ticket, complete=complete)


def _verify(ticket: Ticket, copy: _Copy, transfer: Transfer) -> None:
    plan = copy.plan
    require_generations(transfer.generations, np.array(ticket.generations, np.uint64)[plan.positions])
    found = transfer.digests
    if found is None and copy.on_host is not None:
        found = copy.on_host.of(plan.destination_blocks)
    if copy.kind is not None and found is not None:
        require_digests(found, np.array(copy.rank.digests, np.uint64)[plan.positions], plan.complete)


def _let_others_go(fetch: Fetch) -> None:
    """Of the companions' copies, because one of all failed: until they no longer write."""
    fetch.others.abort()
    with contextlib.suppress(TransferError):
        fetch.others.join()


def _let_go(fetch: Fetch, copy: _Copy) -> None:
    """Of a copy that nobody will wait for, because another one failed: until it no longer writes, or lingers."""
    transfer, copy.transfer = copy.transfer, None
    if transfer is not None:
        transfer.abort()
        with contextlib.suppress(TransferError):
            transfer.wait()
        if transfer.lingers:
            fetch.lingering.append(transfer)
