"""The public port: one HTTP/1.1 connection of a client, on a bare asyncio.Protocol.

Reads requests for the generating endpoints and hands each to the edge as one task; a client that goes away
cancels it. Any other request goes, with its connection, to the aiohttp application, which closes it after one
answer: so there is one way for what must be fast, and one for all the rest. Knows nothing of JSON or workers.
"""

import asyncio
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol, cast

import orjson

from diptych.errors import DeadlineExceeded, DiptychError, InvalidRequest, PayloadTooLarge
from diptych.router.downstream import ClientGone, Downstream
from diptych.router.http1 import MalformedResponse
from diptych.router.request_body import RequestBody
from diptych.router.request_head import MAX_HEAD_BYTES, BadRequest, RequestHead

_HIGH_WATER = 256 * 1024
_MAX_AHEAD = 64 * 1024  # of a client that sends its next requests before the answer
_HEAD_S = 15.0  # for the rest of a head that has begun
_LINGER_S = 2.0  # for a refused client to stop sending: a reset would take the answer away from it


class Serve(Protocol):
    """The edge."""

    async def __call__(self, head: RequestHead, body: bytes, client: Downstream, arrived: float) -> None:
        """Answers in every case but cancellation."""


class Host(Protocol):
    """What all connections of a process have in common (see faces.py)."""

    serve: Serve
    paths: frozenset[str]
    hand_over: Callable[[], asyncio.Protocol]  # makes the protocol that takes what is not in `paths`
    max_body_bytes: int
    body_s: float  # for a body to arrive
    loop: asyncio.AbstractEventLoop
    is_draining: bool
    open: "set[Face]"
    date_line: bytes


class Face(asyncio.Protocol):
    __slots__ = (
        "_ahead",
        "_arrived",
        "_body",
        "_body_timer",
        "_faces",
        "_head",
        "_lingers",
        "_since",
        "_task",
        "_transport",
        "_writable",
        "is_closing",
        "is_full",
    )

    def __init__(self, faces: Host) -> None:
        self._faces = faces
        self._transport: asyncio.Transport | None = None
        self._ahead = b""  # came, and is not looked at yet
        self._head: RequestHead | None = None  # of the request whose body is arriving
        self._body: RequestBody | None = None
        self._body_timer: asyncio.TimerHandle | None = None
        self._arrived = 0.0
        self._since = 0.0  # of what it waits for: a request's begin, or its head's end
        self._task: asyncio.Task[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._lingers = False
        self.is_closing = False
        self.is_full = False

    @property
    def is_busy(self) -> bool:
        return self._task is not None or self._head is not None

    @property
    def date_line(self) -> bytes:
        return self._faces.date_line

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but name
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)
        self._since = time.monotonic()
        self._faces.open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closing = True
        self._transport = None
        self._faces.open.discard(self)
        self._stop_waiting_for_body()
        self.resume_writing()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self.is_full = True

    def resume_writing(self) -> None:
        self.is_full = False
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def data_received(self, data: bytes) -> None:
        if self.is_closing:
            return
        if self._head is not None:
            self._take_body(data)
            return
        if not self._ahead:
            self._since = time.monotonic()
        self._ahead = self._ahead + data if self._ahead else data
        if self._task is None:
            self._read()
        elif len(self._ahead) > _MAX_AHEAD and self._transport is not None:
            self._transport.pause_reading()

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self.is_closing:
            self._transport.write(data)

    async def drain(self) -> None:
        """Until less than too much waits for the client."""
        if self.is_full and not self.is_closing:
            self._writable = self._faces.loop.create_future()
            try:
                await self._writable
            finally:
                self._writable = None
        if self.is_closing:
            raise ClientGone("the client closed its connection")

    @property
    def task(self) -> "asyncio.Task[None] | None":
        """Of the request that runs."""
        return self._task

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close_if_idle_since(self, moment: float) -> None:
        if self._task is None and self._head is None and not self._ahead and self._since < moment:
            self._close()

    def close_if_slow(self, now: float) -> None:
        """A head that began and does not end, or an answer whose rest the client does not read."""
        if self.is_busy or self._transport is None:
            return
        if self.is_closing and now >= self._since + (_LINGER_S if self._lingers else _HEAD_S):
            self._transport.abort()
        elif self._ahead and now >= self._since + _HEAD_S:
            message = f"The request's head did not arrive within {_HEAD_S:g} s."
            self._refuse(DeadlineExceeded(message), HTTPStatus.REQUEST_TIMEOUT)

    def _read(self) -> None:
        """Look for a request in what came."""
        data = self._ahead
        if data.startswith(b"\r\n"):  # some clients end a body with an empty line
            data = data.lstrip(b"\r\n")
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self._ahead = data
            if len(data) > MAX_HEAD_BYTES:
                message = f"The request's head is over the limit of {MAX_HEAD_BYTES} bytes."
                self._refuse(InvalidRequest(message), HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        try:
            head = RequestHead(data[:end])
        except BadRequest as error:
            self._refuse(InvalidRequest(error.message, code="invalid_http"), error.status)
            return
        if head.method != b"POST" or head.path not in self._faces.paths:
            self._hand_over(data)
            return
        self._arrived = time.monotonic()
        self._ahead = data[end + 4 :]
        is_all_here = not head.is_chunked and len(self._ahead) == head.length
        if is_all_here and head.length <= self._faces.max_body_bytes:  # nearly always
            body, self._ahead = self._ahead, b""
            self._begin(head, body)
        else:
            self._expect_body(head)

    def _hand_over(self, data: bytes) -> None:
        transport, self._transport = self._transport, None
        assert transport is not None
        self._faces.open.discard(self)
        other = self._faces.hand_over()
        transport.set_protocol(other)
        other.connection_made(transport)
        other.data_received(data)

    def _expect_body(self, head: RequestHead) -> None:
        faces = self._faces
        try:
            self._body = RequestBody(head, faces.max_body_bytes)
        except PayloadTooLarge as error:
            self._refuse(error, error.status)
            return
        self._head = head
        self._body_timer = faces.loop.call_later(faces.body_s, self._body_is_late)
        begun, self._ahead = self._ahead, b""
        if head.expects_continue and not begun:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._take_body(begun)

    def _take_body(self, data: bytes) -> None:
        head, body = self._head, self._body
        assert head is not None and body is not None
        try:
            rest = body.feed(data)
        except PayloadTooLarge as error:
            self._refuse(error, error.status)
        except MalformedResponse as error:
            message = f"The request's body is malformed: {error}."
            self._refuse(InvalidRequest(message, code="invalid_http"), HTTPStatus.BAD_REQUEST)
        else:
            if body.is_complete:
                head.keep_alive = head.keep_alive and not body.is_last
                self._stop_waiting_for_body()
                self._ahead = rest
                self._begin(head, body.whole())

    def _stop_waiting_for_body(self) -> None:
        self._head = self._body = None
        if self._body_timer is not None:
            self._body_timer.cancel()
            self._body_timer = None

    def _body_is_late(self) -> None:
        message = f"The request body did not arrive within {self._faces.body_s:g} s."
        self._refuse(DeadlineExceeded(message), DeadlineExceeded.status)

    def _refuse(self, error: DiptychError, status: int) -> None:
        """Answer what cannot be taken in, and close: what follows cannot be told apart any more."""
        self._stop_waiting_for_body()
        self._ahead = b""
        Downstream(self, chunked=True, keep_alive=False).answer(status, orjson.dumps(error.body()))
        self.is_closing = self._lingers = True
        self._since = time.monotonic()
        if self._transport is not None:
            self._transport.write_eof()

    def _begin(self, head: RequestHead, body: bytes) -> None:
        self._task = self._faces.loop.create_task(self._serve(head, body))

    async def _serve(self, head: RequestHead, body: bytes) -> None:
        keep_alive = head.keep_alive and not self._faces.is_draining
        client = Downstream(self, chunked=head.minor == 1, keep_alive=keep_alive)
        try:
            await self._faces.serve(head, body, client, self._arrived)
        except ClientGone:
            self.abort()
            return
        finally:
            self._task = None
        self._since = time.monotonic()
        if not client.keep_alive:
            self._close()
        elif self._ahead and self._transport is not None:
            self._transport.resume_reading()
            self._read()

    def _close(self) -> None:
        """After the last byte that waits for the client."""
        if self._transport is not None and not self.is_closing:
            self._since = time.monotonic()
            self.is_closing = True
            self._transport.close()
