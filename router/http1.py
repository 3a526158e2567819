"""HTTP/1.1 as a client of workers reads it: pure state, bytes in and bytes out, no I/O.

Does only what our workers and common HTTP servers send; anything else is a MalformedResponse.
"""

from functools import lru_cache
from typing import Protocol

from diptych.router.fields import Fields, needle

MAX_HEAD_BYTES = 64 * 1024
_MAX_SIZE_LINE = 1024
_HEX_DIGITS = b"0123456789abcdefABCDEF"
_CONNECTION = needle("Connection")
_CONTENT_LENGTH = needle("Content-Length")
_TRANSFER_ENCODING = needle("Transfer-Encoding")


class MalformedResponse(Exception):
    """What came is not an HTTP/1.1 response."""


def build_request(method: str, path: str, netloc: str, headers: bytes, body: bytes) -> bytes:
    """A whole request as one buffer, for one write. `headers` are ready lines, each ended by CRLF."""
    begin = _begin(method, path, netloc)
    if not body:
        return b"%b%b\r\n" % (begin, headers)
    return b"%bContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n%b" % (
        begin,
        len(body),
        headers,
        body,
    )


@lru_cache(maxsize=256)
def _begin(method: str, path: str, netloc: str) -> bytes:
    return f"{method} {path} HTTP/1.1\r\nHost: {netloc}\r\n".encode()


class Head(Fields):
    """Status line and header fields."""

    __slots__ = ("status",)

    def __init__(self, raw: bytes) -> None:
        if not raw.startswith(b"HTTP/1.") or raw[8:9] != b" " or not raw[9:12].isdigit():
            raise MalformedResponse(f"a response begins with {raw[:32]!r}")
        super().__init__(raw)
        self.status = int(raw[9:12])

    @property
    def keep_alive(self) -> bool:
        if self._raw.startswith(b"HTTP/1.0"):
            return False
        return b"close" not in (self.find(_CONNECTION) or b"").lower()

    def body(self) -> "Body":
        """The reader of the body that this head announces."""
        if self.status in (204, 304):
            return LengthBody(0)
        if b"chunked" in (self.find(_TRANSFER_ENCODING) or b"").lower():
            return ChunkedBody()
        length = self.find(_CONTENT_LENGTH)
        if length is None:
            return CloseBody()
        if not length.isdigit():
            raise MalformedResponse(f"Content-Length is {length!r}")
        return LengthBody(int(length))


def split_head(data: bytes) -> tuple[Head, bytes] | None:
    """The head of a response, and what came after it; None: it is not all here."""
    while True:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > MAX_HEAD_BYTES or not data.startswith(b"HTTP/1."[: len(data)]):
                raise MalformedResponse(f"a response begins with {data[:32]!r}")
            return None
        head = Head(data[:end])
        data = data[end + 4 :]
        if head.status >= 200:  # below: "continue" and the like, the answer is still to come
            return head, data


class Body(Protocol):
    done: bool
    excess: bool  # bytes came after the end: the connection cannot carry another response
    ends_at_close: bool

    def feed(self, data: bytes) -> bytes:
        """Take what was read, give the payload that is complete."""


class LengthBody:
    __slots__ = ("_left", "done", "ends_at_close", "excess")

    def __init__(self, length: int) -> None:
        self._left = length
        self.done = length == 0
        self.excess = False
        self.ends_at_close = False

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._left:
            self.excess = True
            data = data[: self._left]
        self._left -= len(data)
        self.done = self._left == 0
        return data


class CloseBody:
    """A body without a length: it ends with the connection."""

    __slots__ = ("done", "ends_at_close", "excess")

    def __init__(self) -> None:
        self.done = False
        self.excess = False
        self.ends_at_close = True

    def feed(self, data: bytes) -> bytes:
        return data


class ChunkedBody:
    """Gives whole chunks only.

    Workers write one chunk for the events of one step, so a stream that breaks off never leaves half an event
    with the client. With a `journal`, the first line of each chunk goes there and is no payload.
    """

    __slots__ = ("_held", "_missing", "done", "ends_at_close", "excess", "journal")

    def __init__(self) -> None:
        self.journal: bytearray | None = None
        self._held: list[bytes] = []  # the beginning of a chunk whose end has not come
        self._missing = 0  # bytes without which looking at it again is useless
        self.done = False
        self.excess = False
        self.ends_at_close = False

    def feed(self, data: bytes) -> bytes:
        if self._held:
            self._held.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return b""
            data = b"".join(self._held)
            self._held.clear()
        self._missing = 0
        payload: list[bytes] = []
        lines: list[bytes] = []
        position = 0
        while not self.done:
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                if len(data) - position > _MAX_SIZE_LINE:
                    raise MalformedResponse("a chunk's size line does not end")
                break
            size = _chunk_size(data[position:line_end])
            if size == 0:
                end = data.find(b"\r\n\r\n", line_end)  # trailers, if any, are between
                if end < 0:
                    break
                self.done = True
                self.excess = end + 4 < len(data)
                position = len(data)
                break
            start = line_end + 2
            end = start + size
            if end + 2 > len(data):
                self._missing = end + 2 - len(data)
                break
            if data[end : end + 2] != b"\r\n":
                raise MalformedResponse("a chunk is longer than its size line says")
            if self.journal is not None:
                line_end = data.find(b"\n", start, end) + 1
                if not line_end:
                    raise MalformedResponse("a chunk has no journal line")
                lines.append(data[start:line_end])
                start = line_end
            if start < end:
                payload.append(data[start:end])
            position = end + 2
        if lines and self.journal is not None:  # only now: they count when their payload is handed out
            self.journal += b"".join(lines)
        if position < len(data):
            self._held.append(data[position:])
        return payload[0] if len(payload) == 1 else b"".join(payload)


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].rstrip(b" \t")
    if not digits or digits.strip(_HEX_DIGITS):  # `int` takes signs, underscores and 0x, too
        raise MalformedResponse(f"a chunk's size line is {line[:32]!r}")
    return int(digits, 16)
