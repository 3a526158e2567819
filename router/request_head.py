"""HTTP/1.1 as the router reads it from clients: the head of one request. Pure.

A head that two readers could understand differently is refused.
"""

import re
from http import HTTPStatus

from diptych.router.fields import Fields, needle

MAX_HEAD_BYTES = 64 * 1024

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_HEAD = re.compile(
    rb"(" + _TOKEN + rb") ([\x21-\x7e]+) HTTP/1\.([01])"  # method, target, minor version
    rb"(?:\r\n" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*)*"
)
_LENGTH = re.compile(rb"[0-9]{1,18}")
_CONNECTION = needle("Connection")
_CONTENT_LENGTH = needle("Content-Length")
_EXPECT = needle("Expect")
_TRANSFER_ENCODING = needle("Transfer-Encoding")


class BadRequest(Exception):
    """What came is not a request that can be answered as one; the connection is of no use any more."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class RequestHead(Fields):
    """Request line and header fields."""

    __slots__ = ("is_chunked", "keep_alive", "length", "method", "minor", "path")

    def __init__(self, raw: bytes) -> None:
        """`raw`: without the empty line at its end."""
        match = _HEAD.fullmatch(raw)
        if match is None:
            raise BadRequest(HTTPStatus.BAD_REQUEST, "The request head is not HTTP/1.1.")
        super().__init__(raw)
        self.method, target, minor = match.groups()
        self.minor = int(minor)
        self.path = target.partition(b"?")[0].decode()
        self.length, self.is_chunked = self._framing()
        connection = (self.find(_CONNECTION) or b"").lower()
        self.keep_alive = b"close" not in connection if self.minor else b"keep-alive" in connection

    @property
    def expects_continue(self) -> bool:
        return (self.find(_EXPECT) or b"").lower() == b"100-continue"

    def _framing(self) -> tuple[int, bool]:
        """The body's length and whether it is chunked; refuses what smuggling is made of."""
        length, encoding = self.find(_CONTENT_LENGTH), self.find(_TRANSFER_ENCODING)
        if length is not None and (self._lower.count(_CONTENT_LENGTH) > 1 or not _LENGTH.fullmatch(length)):
            raise BadRequest(HTTPStatus.BAD_REQUEST, "Content-Length must be one whole number.")
        if encoding is None:
            return int(length or 0), False
        if length is not None or not self.minor or self._lower.count(_TRANSFER_ENCODING) > 1:
            raise BadRequest(HTTPStatus.BAD_REQUEST, "Transfer-Encoding cannot be used in this way.")
        if encoding.lower() != b"chunked":
            raise BadRequest(
                HTTPStatus.NOT_IMPLEMENTED, "The one transfer coding that is understood is chunked."
            )
        return 0, True
