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
        self.incarnation = rank.incarnation
        self.address = (rank.host, rank.port)
        self._secret = secret
        self._timeout_s = timeout_s
        self._renew_s = max(0.05, lease_s / 3)
        self._gone = gone
        self._outgoing: deque[Message] = deque()
        self._reading: dict[str, None] = {}
        self._lock = threading.Lock()
        self._ended = False
        self._closing = threading.Event()
        self._dialling = Stop(timeout_s)
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="kv-link", daemon=True)
        self._thread.start()

    def begin(self, ticket_id: str) -> bool:
        """False when this link has ended and the owner has to be dialled anew."""
        return self._post(Begin(ticket_id))

    def finish(self, ticket_id: str, *, complete: bool) -> bool:
        return self._post(Finish(ticket_id, complete))

    def start_closing(self) -> None:
        """Ends when all that is queued has been sent."""
        self._closing.set()
        self._wake()

    def close(self, flush: Stop) -> None:
        """Waits for that until `flush` says to stop, then drops what is left."""
        self._thread.join(timeout=max(0.0, flush.remaining_s()))
        self._dialling.abort()
        self._thread.join(timeout=1)

    def _post(self, message: Begin | Finish) -> bool:
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

    def _wake(self) -> None:
        with self._lock:
            if not self._ended:
                os.eventfd_write(self._wake_fd, 1)

    def _run(self) -> None:
        try:
            connection = dial(self.address, "control", self.incarnation, self._secret, self._dialling)
            try:
                self._relay(connection)
            finally:
                connection.close()
        except (TransferError, OSError, BadFrame) as error:
            self._report(error)
        except Exception:
            log.exception("KV control link to %s:%d ended by an error of ours", *self.address)
        finally:
            with self._lock:
                self._ended = True
                os.close(self._wake_fd)
            self._gone(self)

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
            return self._outgoing.popleft() if self._outgoing else None

    def _renew(self) -> None:
        with self._lock:
            if self._reading:
                self._outgoing.append(Renew(list(self._reading)))

    def _report(self, error: Exception) -> None:
        if self._closing.is_set():
            return
        with self._lock:
            unsent = sum(isinstance(message, Finish) for message in self._outgoing)
        if unsent:
            log.warning(
                "KV owner at %s:%d cannot be told that %d tickets are done, their leases end by time: %s",
                *self.address,
                unsent,
                error,
            )
        else:
            log.info("KV owner at %s:%d is gone: %s", *self.address, error)
