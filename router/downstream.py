"""The client's side of one request: a JSON answer, or an event stream that worker bytes are written into.

As the sink of a relay it writes to the client's transport itself, each read as one HTTP chunk.
"""

import asyncio
from collections.abc import Mapping
from http import HTTPStatus

import orjson
from aiohttp import HttpVersion11, web
from multidict import CIMultiDict

from diptych.errors import DiptychError
from diptych.router.deadline import within
from diptych.router.exchange import Reply
from diptych.router.frontends.openai import error_event

_HIGH_WATER = 256 * 1024
_PASSED_HEADERS = ("Content-Type", "Retry-After")


class ClientGone(ConnectionResetError):
    """The client closed its connection."""


class Downstream:
    def __init__(self, request: web.Request, headers: Mapping[str, str]) -> None:
        self._request = request
        self._headers = CIMultiDict(headers)
        self._timings: list[str] = []
        self._stream: web.StreamResponse | None = None
        self._chunked = request.version >= HttpVersion11
        self._last = b""
        self.failed = False

    @property
    def started(self) -> bool:
        return self._stream is not None

    def set_header(self, name: str, value: str) -> None:
        self._headers[name] = value

    def add_timing(self, timing: str | None) -> None:
        """One or more entries of Server-Timing."""
        if timing:
            self._timings.append(timing)

    async def start(self, first: bytes, content_type: str = "text/event-stream; charset=utf-8") -> None:
        """Send the head of a stream and its first bytes."""
        headers = self._final_headers()
        headers["Content-Type"] = content_type
        headers["Cache-Control"] = "no-cache"
        headers["X-Accel-Buffering"] = "no"
        stream = web.StreamResponse(headers=headers)
        if self._chunked:
            stream.enable_chunked_encoding()
        await stream.prepare(self._request)
        self._stream = stream
        self._last = first
        await stream.write(first)

    def write(self, data: bytes) -> bool:
        """`data` is not empty: an empty chunk would end the body."""
        transport = self._request.transport
        if transport is None or transport.is_closing():
            return False  # drain says why
        self._last = data
        transport.write(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)
        return transport.get_write_buffer_size() <= _HIGH_WATER

    async def drain(self) -> None:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ClientGone("the client closed its connection")
        await self._request.writer.drain()

    async def finish(self, timeout_s: float) -> web.StreamResponse:
        """End the stream; a client that does not read it to the end is cut off after `timeout_s`."""
        assert self._stream is not None
        try:
            if self._backlog:
                await within(timeout_s, self._stream.write_eof())
            else:
                await self._stream.write_eof()
        except asyncio.TimeoutError:
            self._cut_off()
        return self._stream

    def answer(self, status: int, body: bytes, content_type: str = "application/json") -> web.Response:
        headers = self._final_headers()
        headers["Content-Type"] = content_type
        return web.Response(status=status, body=body, headers=headers)

    def pass_on(self, reply: Reply) -> web.Response:
        """A worker's answer as it is."""
        headers = self._final_headers()
        for name in _PASSED_HEADERS:
            value = reply.head.text(name.lower())
            if value is not None:
                headers[name] = value
        self.failed = reply.status >= HTTPStatus.BAD_REQUEST
        return web.Response(status=reply.status, body=reply.body, headers=headers)

    async def fail(self, error: DiptychError, timeout_s: float) -> web.StreamResponse:
        """Tell the client the error: as an answer, or as the last event of a stream that has begun."""
        if self._stream is not None:
            return await self._fail_stream(orjson.dumps(error.body()), timeout_s)
        self.failed = True
        if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
            self.set_header("Retry-After", "1")
        for name, value in error.headers().items():
            self.set_header(name, value)
        return self.answer(error.status, orjson.dumps(error.body()))

    async def refuse(self, reply: Reply, timeout_s: float) -> web.StreamResponse:
        """Tell the client a worker's error, in the worker's words."""
        if self._stream is None:
            return self.pass_on(reply)
        try:
            body = orjson.dumps(orjson.loads(reply.body))  # on one line
        except orjson.JSONDecodeError:
            body = orjson.dumps(DiptychError(f"A worker answered with status {reply.status}.").body())
        return await self._fail_stream(body, timeout_s)

    async def _fail_stream(self, error_body: bytes, timeout_s: float) -> web.StreamResponse:
        self.failed = True
        # A worker that ends its chunks inside an event must not turn the error into a part of that event.
        between = b"" if self._last.endswith((b"\n\n", b"\r\n\r\n")) or not self._last else b"\n\n"
        self.write(between + error_event(error_body))
        return await self.finish(timeout_s)

    @property
    def _backlog(self) -> bool:
        transport = self._request.transport
        return transport is not None and transport.get_write_buffer_size() > 0

    def _cut_off(self) -> None:
        transport = self._request.transport
        if transport is not None:
            transport.abort()

    def _final_headers(self) -> CIMultiDict[str]:
        if self._timings:
            self._headers["Server-Timing"] = ", ".join(self._timings)
        return self._headers
