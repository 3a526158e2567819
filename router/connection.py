"""One TCP connection to a worker. Hands what comes to the exchange that it carries; knows nothing of HTTP."""

import asyncio
from typing import Protocol, cast

from diptych.errors import DiptychError
from diptych.router.settings import Limits
from diptych.router.wheel import Wheel


class Traffic(Protocol):
    """The exchange on a connection (see exchange.py)."""

    last_read: float

    def feed(self, data: bytes) -> None: ...
    def lost(self) -> None: ...
    def fail(self, error: DiptychError) -> None: ...


class Connection(asyncio.Protocol):
    """One TCP connection; carries one exchange at a time."""

    __slots__ = ("_open", "exchange", "idle_since", "transport")

    def __init__(self, open_connections: "set[Connection]") -> None:
        self._open = open_connections
        self.transport: asyncio.Transport | None = None
        self.exchange: Traffic | None = None
        self.idle_since = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name
        self._open.add(self)

    def data_received(self, data: bytes) -> None:
        if self.exchange is not None:
            self.exchange.feed(data)
        else:
            self.abort()  # bytes that nobody asked for

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._open.discard(self)
        if self.exchange is not None:
            self.exchange.lost()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class Connections(Protocol):
    """Where an exchange gets its connection from (see client.py)."""

    @property
    def url(self) -> str: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def loop(self) -> asyncio.AbstractEventLoop: ...
    @property
    def wheel(self) -> Wheel: ...

    def take_idle(self) -> Connection | None:
        """A kept connection, which the worker may have closed meanwhile."""

    async def connect(self, deadline: float) -> Connection:
        """A new connection; raises WorkerLost or DeadlineExceeded."""

    def give_back(self, connection: Connection, *, reusable: bool) -> None: ...
