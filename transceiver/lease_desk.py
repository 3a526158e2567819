"""The leases of one owner, as its engine and its readers' control connections use them, each on its own thread.

Every lease that ends, however it ends, is told once. Knows nothing of tickets, copies or the blocks' contents.
"""

import threading
from collections.abc import Callable, Iterable, Sequence

from diptych.transceiver.connection import Connection
from diptych.transceiver.frames import BadFrame, Begin, Finish, Message, Renew
from diptych.transceiver.lease import EndedLease, LeaseTable
from diptych.transceiver.settings import LeaseEnded
from diptych.transceiver.stop import Stop


class LeaseDesk:
    """`timeout_s`: for one frame of a reader."""

    def __init__(
        self,
        lease_s: float,
        timeout_s: float,
        clock: Callable[[], float],
        ended: Callable[[LeaseEnded], None],
    ) -> None:
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._ended = ended
        self._lock = threading.Lock()
        self._leases = LeaseTable()

    @property
    def num_open(self) -> int:
        return len(self._leases)

    @property
    def num_read(self) -> int:
        with self._lock:
            return self._leases.num_read

    def open(self, ticket_id: str, block_ids: Iterable[int]) -> None:
        with self._lock:
            self._leases.add(ticket_id, block_ids, self._clock(), self._lease_s)

    def cancel(self, ticket_id: str) -> None:
        """Nobody will come. Unknown tickets are ignored."""
        with self._lock:
            ended = self._leases.cancel(ticket_id)
        self._tell([ended])

    def is_due(self, now: float) -> bool:
        """Whether `expire` may have something to end."""
        return now >= self._leases.next_expiry

    def expire(self, now: float) -> None:
        if self.is_due(now):
            with self._lock:
                expired = self._leases.expire(now)
            self._tell(expired)

    def serve(self, connection: Connection, number: int) -> None:
        """A reader's control connection, until it ends, and with it what that reader alone was reading."""
        try:
            while True:
                connection.wait_readable(None)
                self._apply(connection.receive(Stop(self._timeout_s)), number)
        finally:
            with self._lock:
                lost = self._leases.lose(number)
            self._tell(lost)

    def _apply(self, message: Message, reader: int) -> None:
        ended: EndedLease | None = None
        with self._lock:
            now = self._clock()
            if isinstance(message, Begin):
                self._leases.begin(message.ticket_id, reader, now)
            elif isinstance(message, Renew):
                for ticket_id in message.ticket_ids:
                    self._leases.renew(ticket_id, now)
            elif isinstance(message, Finish):
                if message.complete:
                    ended = self._leases.release(message.ticket_id)
                else:
                    ended = self._leases.give_up(message.ticket_id, reader)
            else:
                raise BadFrame(f"{type(message).__name__} on a control connection")
        self._tell([ended])

    def _tell(self, ended: Sequence[EndedLease | None]) -> None:
        for lease in ended:
            if lease is not None:
                self._ended(LeaseEnded(lease.ticket_id, lease.block_ids, lease.reason))
