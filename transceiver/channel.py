"""A greeted connection on which both sides speak when they like, served by one thread at each end.

Whoever has something to say queues it and never waits. Knows no message's meaning.
"""

import os
import select
import threading
from collections import deque
from collections.abc import Callable

from diptych.transceiver.connection import Connection
from diptych.transceiver.frames import Message
from diptych.transceiver.stop import Stop


class Channel:
    """`say` and `end` may be called from any thread; `run` is the thread that serves the connection."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s`: for one message to be sent, or to arrive once it has begun."""
        self._timeout_s = timeout_s
        self._outgoing: deque[Message] = deque()
        self._lock = threading.Lock()
        self._ending = False
        self._ended = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def say(self, message: Message) -> bool:
        """False when nobody will hear it any more."""
        with self._lock:
            if self._ended:
                return False
            self._outgoing.append(message)
            os.eventfd_write(self._wake_fd, 1)
        return True

    def end(self) -> None:
        """`run` returns when all that is queued has been sent."""
        with self._lock:
            self._ending = True
            if not self._ended:
                os.eventfd_write(self._wake_fd, 1)

    def run(self, connection: Connection, take: Callable[[Message], None]) -> None:
        """Until `end`; raises what the connection raises when it ends first."""
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        poll.register(self._wake_fd, select.POLLIN)
        while True:
            while (message := self._next()) is not None:
                connection.send(message, Stop(self._timeout_s))
            if self._ending:
                return
            ready = {fd for fd, _ in poll.poll()}
            if self._wake_fd in ready:
                os.eventfd_read(self._wake_fd)
            if connection.fileno() in ready:
                take(connection.receive(Stop(self._timeout_s)))

    def close(self) -> None:
        """After `run`, or instead of it."""
        with self._lock:
            self._ended = True
            os.close(self._wake_fd)

    def _next(self) -> Message | None:
        with self._lock:
            return self._outgoing.popleft() if self._outgoing else None
