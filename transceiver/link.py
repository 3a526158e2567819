"""The reader's control connection to one owner: says what is being read, renews it, and when it is done.

Never waited for: messages are queued and a thread of its own sends them, so a fetch over shared memory
neither needs the owner's attention nor delays for it. The link is also how the reader learns that an owner is
gone.
"""

import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from diptych.errors import TransferError
from diptych.transceiver.connection import Connection, dial
from diptych.transceiver.frames import BadFrame, Begin, Finish, Message, Renew
from diptych.transceiver.stop import Stop
from diptych.transceiver.ticket import OwnerRank

log = logging.getLogger(__name__)


class Link:
    def __init__(
        self,
        rank: OwnerRank,
        *,
        lease_s: float,
        secret: bytes | None,
        timeout_s: float,
        gone: Callable[["Link"], None],
    ) -> None:
        self.rank = rank
        self.lease_s = lease_s
        self._secret = secret
        self._timeout_s = timeout_s
        self._renew_s = max(0.05, lease_s / 3)
        self._gone = gone
        self._outgoing: deque[Message] = deque()
        self._reading: dict[str, None] = {}
        self._lock = threading.Lock()
        self._was_up = False
        self._ended = False
        self._closing = threading.Event()
        self._dialling = Stop(timeout_s)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="kv-link", daemon=True)
        self._thread.start()

    def say(self, message: Begin | Finish) -> bool:
        """False when this link has ended and the owner has to be dialled anew."""
        with self._lock:
            if self._ended:
                return False
            if isinstance(message, Begin):
                self._reading[message.ticket_id] = None
            else:
                self._reading.pop(message.ticket_id, None)
            self._outgoing.append(message)
            os.eventfd_write(self._wake_fd, 1)
        return True

    @property
    def is_up(self) -> bool:
        """Whether the owner has been reached, and as far as is known still is."""
        return self._was_up and not self._ended

    def unsaid(self) -> list[Finish]:
        """The ends of fetches that a link which was up, and is cut, could not tell the owner."""
        with self._lock:
            if not (self._ended and self._was_up):
                return []
            unsaid = [message for message in self._outgoing if isinstance(message, Finish)]
            self._outgoing.clear()
            return unsaid

    def start_closing(self) -> None:
        """Ends when all that is queued has been sent."""
        self._closing.set()
        self._wake()

    def close(self, flush: Stop) -> None:
        """Waits for that until `flush` says to stop, then drops what is left."""
        self._thread.join(timeout=max(0.0, flush.remaining_s()))
        self._dialling.abort()
        self._thread.join(timeout=1)

    def _wake(self) -> None:
        with self._lock:
            if not self._ended:
                os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        try:
            connection = self._dial()
            self._was_up = True
            try:
                self._relay(connection)
            finally:
                connection.close()
        except (TransferError, OSError, BadFrame) as error:
            self._report(error)
        except Exception:
            log.exception(
                "KV control link to %s:%d ended by an error of ours", self.rank.host, self.rank.port
            )
        finally:
            with self._lock:
                self._ended = True
                os.close(self._wake_fd)
            self._gone(self)

    def _dial(self) -> Connection:
        address = (self.rank.host, self.rank.port)
        try:
            return dial(address, "control", self.rank.incarnation, self._secret, self._dialling)
        except TransferError as error:
            if error.code != "peer_gone":
                raise
        # Cut in the greeting, perhaps; an owner that is really gone says so again.
        return dial(address, "control", self.rank.incarnation, self._secret, self._dialling)

    def _relay(self, connection: Connection) -> None:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        renew_at = time.monotonic() + self._renew_s
        while True:
            if time.monotonic() >= renew_at:  # also when messages keep coming
                self._renew()
                renew_at = time.monotonic() + self._renew_s
            message = self._next()
            if message is not None:
                connection.send(message, Stop(self._timeout_s))
                self._outgoing.popleft()  # said only now
                continue
            if self._closing.is_set():
                return
            wait_s = max(0.0, renew_at - time.monotonic()) if self._reading else None
            ready = poll.poll(None if wait_s is None else wait_s * 1000 + 1)
            if any(fd == connection.fileno() for fd, _ in ready):
                # The owner has nothing to say here, so this is its end (or nonsense, which ends it too).
                raise ConnectionResetError("the owner closed the control connection")
            if ready:
                os.eventfd_read(self._wake_fd)

    def _next(self) -> Message | None:
        with self._lock:
            return self._outgoing[0] if self._outgoing else None

    def _renew(self) -> None:
        with self._lock:
            if self._reading:
                self._outgoing.append(Renew(list(self._reading)))

    def _report(self, error: Exception) -> None:
        if self._closing.is_set():
            return
        with self._lock:
            unsent = sum(isinstance(message, Finish) for message in self._outgoing)
        if unsent and not self._was_up:
            log.warning(
                "KV owner at %s:%d cannot be told that %d tickets are done, their leases end by time: %s",
                self.rank.host,
                self.rank.port,
                unsent,
                error,
            )
        else:
            log.info("KV owner at %s:%d is gone: %s", self.rank.host, self.rank.port, error)
