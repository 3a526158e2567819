"""The transceiver of one engine process: offers finished prefills to others, and fetches theirs.

The step loop calls it and it never blocks that thread: copies, sockets and waits live on background threads,
their outcomes come out of `poll`. Every fetch ends in exactly one event, every lease in exactly one. A reader
may follow a prefill by its name while the owner computes it. Knows blocks and tickets, nothing of requests,
models or devices.
"""

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial

import msgspec

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout
from diptych.transceiver import ticket as tickets
from diptych.transceiver.companions import NO_COMPANIONS, Companions
from diptych.transceiver.digest import OwnerDigests
from diptych.transceiver.fetch import Fetch, Fetcher
from diptych.transceiver.fetch_queue import FetchQueue
from diptych.transceiver.follow import Follows, OwnerAddress
from diptych.transceiver.frames import Handed, Progress, Withdrawn
from diptych.transceiver.lease_desk import LeaseDesk
from diptych.transceiver.meter import Meter
from diptych.transceiver.metrics import Counts, TransceiverMetrics
from diptych.transceiver.notices import NoticeBoard
from diptych.transceiver.pool import KvPool
from diptych.transceiver.quarantine import Quarantine
from diptych.transceiver.server import Server
from diptych.transceiver.settings import (
    FetchDone,
    FetchFailed,
    FollowEvent,
    LeaseEnded,
    QuarantineEnded,
    TransceiverEvent,
    TransceiverSettings,
)
from diptych.transceiver.stop import Stop
from diptych.transceiver.ticket import OwnerRank, Ticket
from diptych.transceiver.transport import TransportContext
from diptych.transceiver.ways import open_ways

log = logging.getLogger(__name__)


class Transceiver:
    """`wake` is called from background threads when `poll` has something; `clock` is the leases' clock."""

    def __init__(
        self,
        memory: KvPool,
        layout: KvLayout,
        settings: TransceiverSettings,
        *,
        wake: Callable[[], None],
        companions: Companions = NO_COMPANIONS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        secret = settings.secret.encode() if settings.secret else None
        self._memory = memory
        self._layout = layout
        self._settings = settings
        self._wake = wake
        self._companions = companions
        self._clock = clock
        self._digests = OwnerDigests(memory, layout.tokens_per_block)
        self._desk = LeaseDesk(settings.lease_s, settings.timeout_s, clock, self._post)
        self._fetches: dict[int, tuple[Fetch, Future[None]]] = {}
        self._fetch_ids = itertools.count(1)
        self._events: deque[TransceiverEvent] = deque()
        self._lock = threading.Lock()  # of the counts
        self._counts = Counts()
        self._meter = Meter()
        self._server = Server(
            incarnation=memory.identity.incarnation,
            bind_host=settings.bind_host,
            port=settings.port,
            advertise_host=settings.advertise_host,
            secret=secret,
            tick=self._tick,
        )
        try:
            context = TransportContext(
                self._server, secret, settings.timeout_s, copy_programs=settings.copy_programs
            )
            self._ways = open_ways(settings, context, memory)
        except BaseException:
            self._server.close()
            raise
        self._fetcher = Fetcher(
            layout,
            self._ways.transports,
            self._meter,
            verify_digest=settings.verify_digest,
            measure=settings.measure_transports,
            secret=secret,
            timeout_s=settings.timeout_s,
            companions=companions,
        )
        self._queue = FetchQueue(settings.max_concurrent_fetches, settings.max_tokens_in_flight)
        self._quarantine = Quarantine(self._end_quarantine)
        self._board = NoticeBoard(settings.timeout_s)
        self._follows = Follows(secret=secret, timeout_s=settings.timeout_s, post=self._post_follow)
        self._server.handle("control", self._desk.serve)
        self._server.handle("notices", self._board.serve)
        self._server.start()

    def offer(self, block_ids: Sequence[int], num_tokens: int) -> tuple[str, bytes]:
        """Open a lease on these blocks, which are complete: (ticket id, ticket for the reader)."""
        ticket_id = tickets.new_ticket_id()
        ticket = self._ticket(ticket_id, block_ids, num_tokens)
        self._desk.open(ticket_id, block_ids)
        return ticket_id, ticket

    def is_followed(self, key: str) -> bool:
        """Owner side: whether a reader listens to this prefill now."""
        return self._board.is_followed(key)

    def show_progress(self, key: str, content: bytes, block_ids: Sequence[int], num_tokens: int) -> None:
        """Owner side: the prefill's first `num_tokens` tokens are computed, in these full blocks.

        They are not leased: a reader finds out by their generation numbers when they went to somebody else.
        """
        self._board.progress(Progress(key, content, num_tokens, self._ticket("", block_ids, num_tokens)))

    def hand_over(self, key: str, content: bytes, ticket: bytes | None, note: bytes) -> None:
        """Owner side: the prefill is over; its reader, also one that asks later, gets ticket and note."""
        self._board.end(Handed(key, content, ticket or b"", note))

    def withdraw(self, key: str, reason: str) -> None:
        """Owner side: there will be no ticket."""
        self._board.end(Withdrawn(key, reason))

    def follow(self, owner: str, key: str) -> int:
        """Reader side: hear how the owner at that `endpoint` gets on with a prefill; `poll` tells."""
        return self._follows.follow(owner, key)

    def unfollow(self, follow_id: int) -> None:
        """Events that have come already may still be polled."""
        self._follows.unfollow(follow_id)

    def fetch(self, ticket: bytes, source_indices: Sequence[int], destination_blocks: Sequence[int]) -> int:
        """Start to copy the ticket's blocks at these indices into these blocks of ours; `poll` tells the end.

        With no blocks at all it only tells the owner that the ticket is not needed.
        """
        fetch = Fetch(
            next(self._fetch_ids),
            ticket,
            tuple(source_indices),
            tuple(destination_blocks),
            Stop(self._settings.timeout_s),
        )
        num_tokens = len(fetch.destination_blocks) * self._layout.tokens_per_block
        self._fetches[fetch.fetch_id] = (fetch, self._queue.submit(num_tokens, partial(self._run, fetch)))
        return fetch.fetch_id

    def abort(self, fetch_id: int) -> None:
        """The destination stays in use until the fetch's event says otherwise."""
        fetch, future = self._fetches.get(fetch_id, (None, None))
        if fetch is None or future is None:
            return
        fetch.abort()
        if future.cancel():  # it had not begun
            self._post(FetchFailed(fetch_id, "cancelled", "the fetch was aborted before it began"))
            self._queue.submit(0, partial(self._decline, fetch))

    def release(self, ticket_id: str) -> None:
        """Owner side: nobody will come for this ticket. Unknown tickets are ignored."""
        self._desk.cancel(ticket_id)

    def poll(self, now: float) -> list[TransceiverEvent]:
        """What has happened since the last call. `now` is the leases' clock."""
        self._desk.expire(now)
        events: list[TransceiverEvent] = []
        while self._events:
            event = self._events.popleft()
            if isinstance(event, FetchDone | FetchFailed):
                del self._fetches[event.fetch_id]
            events.append(event)
        return events

    def owner(self, block_ids: Sequence[int], num_tokens: int) -> OwnerRank:
        """Our part of these blocks, which are complete and which somebody else holds a lease on."""
        return self._own_ticket("", block_ids, num_tokens).first_rank()

    def forget(self, incarnation: str) -> None:
        """An owner is gone: let go of its memory."""
        self._fetcher.forget(incarnation)

    def describe(self) -> OwnerRank:
        """How a peer reaches this pool, without any blocks: for one that only measures the way."""
        host, port = self._server.address
        return OwnerRank(
            ticket_id="",
            incarnation=self._memory.identity.incarnation,
            layout=self._layout,
            fingerprint=self._memory.identity.fingerprint,
            host=host,
            port=port,
            transports=self._ways.regions,
        )

    @property
    def address(self) -> tuple[str, int]:
        """Where readers dial."""
        return self._server.address

    @property
    def endpoint(self) -> str:
        """What a reader's `follow` takes."""
        return str(OwnerAddress(*self._server.address, self._memory.identity.incarnation))

    def metrics(self) -> TransceiverMetrics:
        with self._lock:
            return self._counts.snapshot(
                open_fetches=len(self._fetches),
                queued_fetches=self._queue.num_waiting,
                open_leases=self._desk.num_open,
                open_leases_read=self._desk.num_read,
                links=self._meter.links(),
            )

    def close(self) -> None:
        """Ends every fetch (their events can still be polled) and lets go of the pool's memory."""
        for fetch_id in list(self._fetches):
            self.abort(fetch_id)
        self._follows.close()
        self._queue.close()
        self._fetcher.close()
        for transport in self._ways.transports.values():
            transport.close()
        self._quarantine.close()
        self._server.close()

    def _ticket(self, ticket_id: str, block_ids: Sequence[int], num_tokens: int) -> bytes:
        ours = self._own_ticket(ticket_id, block_ids, num_tokens)
        others = self._companions.owners(block_ids, num_tokens)
        if others:
            ours = msgspec.structs.replace(ours, ranks=[ours.first_rank(), *others])
        return tickets.encode(ours)

    def _own_ticket(self, ticket_id: str, block_ids: Sequence[int], num_tokens: int) -> Ticket:
        generations = self._memory.generations[list(block_ids)].tolist()
        digests: list[int] = []
        if self._settings.verify_digest:
            digests = self._digests.of(block_ids, generations, num_tokens)
        rank = self.describe()
        return Ticket(
            ticket_id=ticket_id,
            incarnation=rank.incarnation,
            layout=rank.layout,
            fingerprint=rank.fingerprint,
            num_tokens=num_tokens,
            block_ids=list(block_ids),
            generations=generations,
            digests=digests,
            digest_kind=self._memory.digest_kind,
            host=rank.host,
            port=rank.port,
            transports=rank.transports,
            lease_s=self._settings.lease_s,
        )

    def _run(self, fetch: Fetch) -> None:
        event: FetchDone | FetchFailed
        try:
            event = self._fetcher.run(fetch)
        except TransferError as error:
            held = fetch.destination_blocks if fetch.lingering else ()
            event = FetchFailed(fetch.fetch_id, error.code or "internal", error.message, held)
        except Exception as error:
            log.exception("KV fetch %d failed by an error of ours", fetch.fetch_id)
            event = FetchFailed(fetch.fetch_id, "internal", f"{type(error).__name__}: {error}")
        self._post(event)
        if fetch.lingering:
            self._quarantine.hold(fetch.destination_blocks, fetch.lingering, self._settings.lease_s)

    def _end_quarantine(self, block_ids: tuple[int, ...]) -> None:
        self._events.append(QuarantineEnded(block_ids))
        self._wake()

    def _decline(self, fetch: Fetch) -> None:
        try:
            self._fetcher.decline(fetch)
        except TransferError as error:
            log.debug("an aborted fetch had no readable ticket: %s", error)

    def _post_follow(self, event: FollowEvent) -> None:
        self._events.append(event)
        self._wake()

    def _post(self, event: FetchDone | FetchFailed | LeaseEnded) -> None:
        with self._lock:
            self._counts.add(event)
        self._events.append(event)
        self._wake()

    def _tick(self) -> None:
        # An engine that sleeps must return expired blocks too, not only one that gets new work.
        if self._desk.is_due(self._clock()):
            self._wake()
