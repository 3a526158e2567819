"""The connections to one worker: made when needed, kept while idle, taken newest first.

Knows nothing of roles, legs or JSON; what happens on a connection is in exchange.py.
"""

import asyncio
import time
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType

from diptych.discovery.address import parse_address
from diptych.errors import DeadlineExceeded, WorkerLost
from diptych.router.connection import Connection
from diptych.router.deadline import within
from diptych.router.exchange import Exchange, Reply
from diptych.router.http1 import build_request
from diptych.router.settings import Limits
from diptych.router.wheel import Wheel

NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class WorkerClient:
    """The connections to one worker."""

    def __init__(self, url: str, limits: Limits, headers: Mapping[str, str] = NO_HEADERS) -> None:
        """`headers`: of every request."""
        self._address = parse_address(url)
        self._netloc = self._address.netloc
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode()
        self.url = self._address.url
        self.limits = limits
        # Kept here because asking for it costs a system call each time before Python 3.12.
        self.loop = asyncio.get_running_loop()
        self.wheel = Wheel(self.loop)
        self.connections: set[Connection] = set()
        self._idle: deque[Connection] = deque()
        self._closed = False

    def exchange(
        self, method: str, path: str, *, deadline: float, headers: bytes = b"", body: bytes = b""
    ) -> Exchange:
        """`deadline` is the monotonic time at which the exchange fails, wherever it is then."""
        lines = self._headers + headers
        return Exchange(self, build_request(method, path, self._netloc, lines, body), deadline)

    async def request(
        self, method: str, path: str, *, deadline: float, headers: bytes = b"", body: bytes = b""
    ) -> Reply:
        async with self.exchange(method, path, deadline=deadline, headers=headers, body=body) as exchange:
            return Reply(exchange.head, await exchange.read())

    def take_idle(self) -> Connection | None:
        oldest = time.monotonic() - self.limits.keep_alive_s
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is None or connection.transport.is_closing():
                continue
            if connection.idle_since >= oldest:
                return connection
            connection.abort()
        return None

    def give_back(self, connection: Connection, *, reusable: bool) -> None:
        if self._closed or not reusable:
            connection.abort()
            return
        connection.idle_since = time.monotonic()
        self._idle.append(connection)
        oldest = connection.idle_since - self.limits.keep_alive_s
        while self._idle[0].idle_since < oldest:  # never used again: the newest are taken first
            self._idle.popleft().abort()

    async def connect(self, deadline: float) -> Connection:
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"The deadline passed before the worker at {self.url} was asked.")
        budget = min(self.limits.connect_s, left)
        connection = Connection(self.connections)
        address = self._address
        try:
            await within(budget, self.loop.create_connection(lambda: connection, address.host, address.port))
        except asyncio.CancelledError:
            connection.abort()
            raise
        except asyncio.TimeoutError:
            message = f"The worker at {self.url} did not accept a connection within {budget:.1f} s."
            raise WorkerLost(message) from None
        except OSError as error:
            raise WorkerLost(f"The worker at {self.url} cannot be reached: {error}.") from error
        return connection

    @property
    def last_heard(self) -> float:
        """When the last byte came on a connection in use; 0 when none did."""
        return max((c.exchange.last_read for c in self.connections if c.exchange is not None), default=0.0)

    def cut(self, error: WorkerLost) -> None:
        """Whatever runs on this worker ends with the error; what it still sends goes nowhere."""
        for connection in tuple(self.connections):
            if connection.exchange is not None:
                connection.exchange.fail(error)
            else:
                connection.abort()

    def close(self) -> None:
        """Close idle connections now, and those in use when their exchange ends."""
        self._closed = True
        while self._idle:
            self._idle.pop().abort()
