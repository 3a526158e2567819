"""One request to a worker and its response, on a bare asyncio.Protocol.

Leaving an exchange early closes its connection, which is how a leg is cancelled. The body is either read
whole or relayed: then every read goes from the worker's socket to the sink inside `data_received`, and no
task wakes. Of a body that nobody has asked for yet, a little is held, and the worker must wait with the rest.
Every wait has a deadline, kept by the wheel of the client. Knows nothing of legs or JSON.

An exchange that is given a `journal` before it is entered puts the worker's journal lines there: when it
raises, they are exactly of what was read or relayed. `journal` is None again when the worker keeps none.
"""

import asyncio
import math
import time
from types import TracebackType
from typing import Protocol

from diptych.errors import DeadlineExceeded, DiptychError, WorkerLost
from diptych.journal import HEADER
from diptych.router.connection import Connection, Connections
from diptych.router.deadline import within
from diptych.router.fields import needle
from diptych.router.http1 import Body, ChunkedBody, Head, MalformedResponse, split_head
from diptych.router.wheel import Bucket

_JOURNAL = needle(HEADER)
_MAX_UNASKED = 64 * 1024  # bytes of a body that are held before anybody asks for it


class Sink(Protocol):
    """Where a relayed body goes."""

    def write(self, data: bytes) -> bool:
        """Take the data; False: no more until `drain` has returned."""

    async def drain(self) -> None: ...


class Reply:
    """A whole response."""

    __slots__ = ("body", "head", "status")

    def __init__(self, head: Head, body: bytes) -> None:
        self.status = head.status
        self.head = head
        self.body = body


class _StaleConnection(WorkerLost):
    """A kept connection that the worker had closed before it saw the request."""


class Exchange:
    """One request and its response, used as ``async with``: entered when the response's head is here.

    Raises WorkerLost when the worker cannot be reached or breaks off, DeadlineExceeded when it is too slow.
    """

    __slots__ = (
        "_alarm",
        "_body",
        "_client",
        "_connection",
        "_deadline",
        "_error",
        "_finished",
        "_loop",
        "_message",
        "_partial_head",
        "_parts",
        "_paused",
        "_reused",
        "_room",
        "_sink",
        "_waiter",
        "head",
        "journal",
        "last_read",
    )

    head: Head

    def __init__(self, client: Connections, message: bytes, deadline: float) -> None:
        self._client = client
        self._message = message
        self._deadline = deadline
        self._loop = client.loop
        self._connection: Connection | None = None
        self._reused = False
        self._partial_head = b""
        self._body: Body | None = None
        self._parts: list[bytes] = []
        self._sink: Sink | None = None
        self._paused = False
        self._room: float = _MAX_UNASKED
        self._finished = False
        self._error: DiptychError | None = None
        self.last_read = 0.0
        self._alarm: Bucket | None = None  # what keeps the deadline
        self._waiter: asyncio.Future[None] | None = None
        self.journal: bytearray | None = None

    @property
    def status(self) -> int:
        return self.head.status

    async def __aenter__(self) -> "Exchange":
        try:
            await self._send()
        except BaseException:
            self._close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    async def read(self) -> bytes:
        """The whole body."""
        self._room = math.inf
        if self._paused:
            self._resume()
        while not self._finished:
            await self._wait()
        return b"".join(self._parts)

    async def first(self) -> bytes:
        """The first bytes of the body, taken out of it; empty when the body is."""
        while not self._parts and not self._finished:
            try:
                await self._wait()
            except DiptychError:
                if not self._parts:  # bytes that came just before the end count: the journal has them
                    raise
        data = b"".join(self._parts)
        self._parts.clear()
        return data

    async def relay(self, sink: Sink) -> None:
        """Pass the rest of the body to `sink`; returns after its last byte."""
        self._sink = sink
        if self._parts:
            pending = b"".join(self._parts)
            self._parts.clear()
            self._pass(pending)
        while not self._finished:
            if not self._paused:
                await self._wait()
                continue
            try:
                await within(self._deadline - time.monotonic(), sink.drain())
            except asyncio.TimeoutError:
                raise self._too_late() from None
            self._resume()

    async def _send(self) -> None:
        connection = self._client.take_idle()
        if connection is not None:
            self._start(connection, reused=True)
            try:
                await self._wait_for_head()
                return
            except _StaleConnection:
                # The request was not answered with a single byte, so it may go out once more.
                self._error = None
        self._start(await self._client.connect(self._deadline), reused=False)
        await self._wait_for_head()

    def _start(self, connection: Connection, *, reused: bool) -> None:
        if connection.transport is None:
            raise WorkerLost(f"The worker at {self._client.url} closed the connection at once.")
        self._connection, self._reused = connection, reused
        connection.exchange = self
        self._set_alarm(time.monotonic() + self._client.limits.idle_s)
        connection.transport.write(self._message)

    async def _wait_for_head(self) -> None:
        while self._body is None:
            try:
                await self._wait()
            except DiptychError:
                if not self._parts:  # see `first`
                    raise

    async def _wait(self) -> None:
        """Until something happened; raises the error of a failed exchange."""
        if self._error is None:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._error is not None:
            raise self._error

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def feed(self, data: bytes) -> None:
        """Called by the connection with each read."""
        self.last_read = time.monotonic()
        try:
            if self._body is None:
                data = self._read_head(data)
            if self._body is None:
                return
            payload = self._body.feed(data) if data else b""
        except MalformedResponse as error:
            self.fail(WorkerLost(f"The worker at {self._client.url} does not speak HTTP/1.1: {error}."))
            return
        if payload:
            self._pass(payload)
        if self._body.done:
            self._finish()
        elif self._sink is None or self._paused:
            self._wake()

    def lost(self) -> None:
        """Called by the connection when it is closed."""
        if self._body is not None and self._body.ends_at_close:
            self._finish()
        elif self._reused and self.last_read == 0.0:
            self.fail(_StaleConnection("stale connection"))
        else:
            when = "before it answered" if self._body is None else "in the middle of its answer"
            self.fail(WorkerLost(f"The worker at {self._client.url} closed the connection {when}."))

    def _read_head(self, data: bytes) -> bytes:
        data = self._partial_head + data
        found = split_head(data)
        if found is None:
            self._partial_head = data
            return b""
        self._partial_head = b""
        self.head, data = found
        self._body = self.head.body()
        if self.journal is not None:
            self._begin_journal(self._body)
        return data

    def _begin_journal(self, body: Body) -> None:
        """The worker may not have one, asked for or not: then nor does this exchange."""
        if self.head.find(_JOURNAL) is not None and isinstance(body, ChunkedBody):
            body.journal = self.journal
        else:
            self.journal = None

    def _pass(self, payload: bytes) -> None:
        if self._sink is None:
            self._parts.append(payload)
            self._room -= len(payload)
            has_room = self._room >= 0
        else:
            has_room = self._sink.write(payload)
        if not has_room and not self._paused:
            self._paused = True
            if self._connection is not None and self._connection.transport is not None:
                self._connection.transport.pause_reading()

    def _resume(self) -> None:
        self._paused = False
        self.last_read = time.monotonic()
        if self._connection is not None and self._connection.transport is not None:
            self._connection.transport.resume_reading()

    def _set_alarm(self, due: float) -> None:
        self._alarm = self._client.wheel.add(self, min(due, self._deadline))

    def on_time(self) -> None:
        now = time.monotonic()
        idle_s = self._client.limits.idle_s
        if now >= self._deadline:
            self.fail(self._too_late())
        elif self._body is None or self._paused:  # computing, or waiting for us: not idle
            self._set_alarm(now + idle_s)
        elif now >= self.last_read + idle_s:
            self.fail(DeadlineExceeded(f"The worker at {self._client.url} sent nothing for {idle_s:g} s."))
        else:
            self._set_alarm(self.last_read + idle_s)

    def _too_late(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"The worker at {self._client.url} did not finish before the deadline.")

    def _finish(self) -> None:
        if self._finished or self._error is not None:
            return
        assert self._body is not None
        self._finished = True
        connection = self._detach()
        if connection is not None:
            reusable = self.head.keep_alive and not self._body.excess and not self._body.ends_at_close
            self._client.give_back(connection, reusable=reusable and not self._paused)
        self._wake()

    def fail(self, error: DiptychError) -> None:
        if self._finished or self._error is not None:
            return
        self._error = error
        self._close()
        self._wake()

    def _close(self) -> None:
        connection = self._detach()
        if connection is not None:
            connection.abort()

    def _detach(self) -> Connection | None:
        if self._alarm is not None:
            self._alarm.discard(self)
            self._alarm = None
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.exchange = None
        return connection
