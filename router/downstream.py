"""The client's side of one request: a JSON answer, or an event stream that worker bytes are written into.

Writes heads and chunks to the client's transport itself, each with one system call. Knows nothing of legs.
"""

import asyncio
from http import HTTPStatus
from typing import Protocol

import msgspec
import orjson

from diptych.errors import DiptychError
from diptych.router.deadline import within
from diptych.router.exchange import Reply
from diptych.router.fields import needle
from diptych.router.frontends.openai import error_event

_PASSED_HEADERS = tuple((needle(name), name.encode()) for name in ("Content-Type", "Retry-After"))
_OK, _BAD_REQUEST = HTTPStatus.OK, HTTPStatus.BAD_REQUEST  # see flow.py
_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_STREAM_HEADERS = b"Cache-Control: no-cache\r\nX-Accel-Buffering: no\r\n"
_NO_CONTROLS = dict.fromkeys([*range(32), 127])


class ClientGone(ConnectionResetError):
    """The client closed its connection."""


class Wire(Protocol):
    """The client's connection, as one answer needs it (see face.py)."""

    is_closing: bool
    is_full: bool  # more bytes wait for the client than is good

    @property
    def date_line(self) -> bytes: ...

    def write(self, data: bytes) -> None: ...
    async def drain(self) -> None: ...
    def abort(self) -> None: ...


class Answered(msgspec.Struct, frozen=True):
    """The client has been told; nothing is left to do."""

    status: int


class Downstream:
    __slots__ = (
        "_chunked",
        "_headers",
        "_last",
        "_status",
        "_timings",
        "_wire",
        "failed",
        "keep_alive",
    )

    def __init__(self, wire: Wire, *, chunked: bool, keep_alive: bool) -> None:
        """`chunked`: the client understands it; otherwise a stream ends with the connection."""
        self._wire = wire
        self._chunked = chunked
        self._headers = b""
        self._timings: list[str] = []
        self._status: int | None = None
        self._last = b""
        self.keep_alive = keep_alive
        self.failed = False

    @property
    def started(self) -> bool:
        return self._status is not None

    def set_header(self, name: str, value: str) -> None:
        """`value` may come from anywhere: what could end the line is left out."""
        if not value.isprintable():
            value = value.translate(_NO_CONTROLS)
        self._headers += f"{name}: {value}\r\n".encode("latin-1", "replace")

    def add_timing(self, timing: str | None) -> None:
        """One or more entries of Server-Timing."""
        if timing:
            self._timings.append(timing)

    async def start(self, first: bytes, content_type: str = "text/event-stream; charset=utf-8") -> None:
        """Send the head of a stream and its first bytes."""
        framing = b"Transfer-Encoding: chunked\r\n" if self._chunked else b""
        if not self._chunked:
            self.keep_alive = False
        self._last = first
        head = self._head(_OK, content_type.encode("latin-1"), _STREAM_HEADERS + framing)
        self._wire.write(head + (self._frame(first) if first else b""))

    def write(self, data: bytes) -> bool:
        """`data` is not empty: an empty chunk would end the body."""
        wire = self._wire
        if wire.is_closing:
            return False  # drain says why
        self._last = data
        wire.write(self._frame(data))
        return not wire.is_full

    async def drain(self) -> None:
        if self._wire.is_closing:
            raise ClientGone("the client closed its connection")
        await self._wire.drain()

    async def finish(self, timeout_s: float) -> Answered:
        """End the stream; a client that does not read it to the end is cut off after `timeout_s`."""
        assert self._status is not None
        if self._chunked and not self._wire.is_closing:
            self._wire.write(b"0\r\n\r\n")
        if self._wire.is_full:
            try:
                await within(timeout_s, self._wire.drain())
            except asyncio.TimeoutError:
                self._wire.abort()
        return Answered(self._status)

    def answer(self, status: int, body: bytes, content_type: str = "application/json") -> Answered:
        length = b"Content-Length: %d\r\n" % len(body)
        self._wire.write(self._head(status, content_type.encode("latin-1"), length) + body)
        return Answered(status)

    def pass_on(self, reply: Reply) -> Answered:
        """A worker's answer as it is."""
        framing = b"Content-Length: %d\r\n" % len(reply.body)
        for sought, name in _PASSED_HEADERS:
            value = reply.head.find(sought)
            if value is not None:
                framing += b"%b: %b\r\n" % (name, value)
        self.failed = reply.status >= _BAD_REQUEST
        self._wire.write(self._head(reply.status, None, framing) + reply.body)
        return Answered(reply.status)

    async def fail(self, error: DiptychError, timeout_s: float) -> Answered:
        """Tell the client the error: as an answer, or as the last event of a stream that has begun."""
        if self._status is not None:
            return await self._fail_stream(orjson.dumps(error.body()), timeout_s)
        self.failed = True
        headers = error.headers()
        if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
            headers.setdefault("Retry-After", "1")
        for name, value in headers.items():
            self.set_header(name, value)
        return self.answer(error.status, orjson.dumps(error.body()))

    async def refuse(self, reply: Reply, timeout_s: float) -> Answered:
        """Tell the client a worker's error, in the worker's words."""
        if self._status is None:
            return self.pass_on(reply)
        try:
            body = orjson.dumps(orjson.loads(reply.body))  # on one line
        except orjson.JSONDecodeError:
            body = orjson.dumps(DiptychError(f"A worker answered with status {reply.status}.").body())
        return await self._fail_stream(body, timeout_s)

    async def _fail_stream(self, error_body: bytes, timeout_s: float) -> Answered:
        self.failed = True
        # A worker that ends its chunks inside an event must not turn the error into a part of that event.
        between = b"" if self._last.endswith((b"\n\n", b"\r\n\r\n")) or not self._last else b"\n\n"
        self.write(between + error_event(error_body))
        return await self.finish(timeout_s)

    def _frame(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _head(self, status: int, content_type: bytes | None, framing: bytes) -> bytes:
        self._status = status
        line = _STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status
        if content_type is not None:
            framing += b"Content-Type: %b\r\n" % content_type
        if self._timings:  # ours, and workers' heads, which have no controls
            self._headers += f"Server-Timing: {', '.join(self._timings)}\r\n".encode("latin-1", "replace")
        if not self.keep_alive:
            framing += b"Connection: close\r\n"
        return b"%b%b%b%b\r\n" % (line, self._wire.date_line, framing, self._headers)
