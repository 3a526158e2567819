"""HTTP/1.1 as the router reads it from clients: the head of one request. Pure.

A head that two readers could understand differently is refused; what is searched is searched in place, since
few headers are ever looked at.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from http import HTTPStatus
from typing import TypeVar, overload

T = TypeVar("T")

MAX_HEAD_BYTES = 64 * 1024

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_HEAD = re.compile(
    rb"(?P<method>" + _TOKEN + rb") (?P<target>[\x21-\x7e]+) HTTP/1\.(?P<minor>[01])"
    rb"(?:\r\n" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*)*"
)
_LENGTH = re.compile(rb"[0-9]{1,18}")


class BadRequest(Exception):
    """What came is not a request that can be answered as one; the connection is of no use any more."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class RequestHead(Mapping[str, str]):
    """Request line and headers; as a mapping, the first value of each header, its name in any case."""

    __slots__ = ("_lower", "_raw", "is_chunked", "keep_alive", "length", "method", "minor", "path")

    def __init__(self, raw: bytes) -> None:
        """`raw`: without the empty line at its end."""
        match = _HEAD.fullmatch(raw)
        if match is None:
            raise BadRequest(HTTPStatus.BAD_REQUEST, "The request head is not HTTP/1.1.")
        self._raw = raw
        self._lower = raw.lower()
        self.method, target, minor = match.group("method", "target", "minor")
        self.minor = int(minor)
        self.path = target.partition(b"?")[0].decode()
        self.length, self.is_chunked = self._framing()
        connection = self._bytes(b"\r\nconnection:") or b""
        if self.minor:
            self.keep_alive = b"close" not in connection.lower()
        else:
            self.keep_alive = b"keep-alive" in connection.lower()

    @property
    def expects_continue(self) -> bool:
        return (self._bytes(b"\r\nexpect:") or b"").lower() == b"100-continue"

    def __getitem__(self, name: str) -> str:
        value = self._bytes(_needle(name))
        if value is None:
            raise KeyError(name)
        return value.decode("latin-1")

    @overload
    def get(self, name: str, /) -> str | None: ...
    @overload
    def get(self, name: str, /, default: str | T) -> str | T: ...
    def get(self, name: str, /, default: str | T | None = None) -> str | T | None:
        """Without the exception that a Mapping's own costs for what is not there."""
        value = self._bytes(_needle(name))
        return default if value is None else value.decode("latin-1")

    def __iter__(self) -> Iterator[str]:
        for line in self._lower.split(b"\r\n")[1:]:
            yield line.partition(b":")[0].decode()

    def __len__(self) -> int:
        return self._raw.count(b"\r\n")

    def _framing(self) -> tuple[int, bool]:
        """The body's length and whether it is chunked; refuses what smuggling is made of."""
        lower = self._lower
        length = self._bytes(b"\r\ncontent-length:")
        if length is not None and (lower.count(b"\r\ncontent-length:") > 1 or not _LENGTH.fullmatch(length)):
            raise BadRequest(HTTPStatus.BAD_REQUEST, "Content-Length must be one whole number.")
        encoding = self._bytes(b"\r\ntransfer-encoding:")
        if encoding is None:
            return int(length or 0), False
        if length is not None or not self.minor or lower.count(b"\r\ntransfer-encoding:") > 1:
            raise BadRequest(HTTPStatus.BAD_REQUEST, "Transfer-Encoding cannot be used in this way.")
        if encoding.lower() != b"chunked":
            raise BadRequest(
                HTTPStatus.NOT_IMPLEMENTED, "The one transfer coding that is understood is chunked."
            )
        return 0, True

    def _bytes(self, needle: bytes) -> bytes | None:
        start = self._lower.find(needle)
        if start < 0:
            return None
        start += len(needle)
        end = self._raw.find(b"\r\n", start)
        return self._raw[start : len(self._raw) if end < 0 else end].strip(b" \t")


@lru_cache(maxsize=64)
def _needle(name: str) -> bytes:
    return b"\r\n%b:" % name.lower().encode("latin-1")
