"""The body of a client's request, as it arrives. Pure; see face.py for who reads it."""

from diptych.errors import PayloadTooLarge
from diptych.router.http1 import ChunkedBody
from diptych.router.request_head import RequestHead

_MAX_UNFRAMED = 64 * 1024  # more than the limit, of a chunk whose end has not come


class RequestBody:
    __slots__ = ("_chunked", "_limit", "_missing", "_num_bytes", "_num_unframed", "_parts", "is_complete")

    def __init__(self, head: RequestHead, limit: int) -> None:
        """`limit`: bytes of a body. Raises PayloadTooLarge, as `feed` does."""
        self._limit = limit
        self._chunked = ChunkedBody() if head.is_chunked else None
        self._parts: list[bytes] = []
        self._num_bytes = 0  # of `_parts`
        self._missing = head.length
        self._num_unframed = 0  # that came since the last whole chunk
        self.is_complete = False
        self._check(head.length)

    @property
    def is_last(self) -> bool:
        """The next request's begin came with it and is lost."""
        return self._chunked is not None and self._chunked.excess

    def feed(self, data: bytes) -> bytes:
        """Take what came, give back what is the next request's. Raises MalformedResponse for broken chunks."""
        if self._chunked is None:
            part, rest = data[: self._missing], data[self._missing :]
            self._missing -= len(part)
            self.is_complete = self._missing == 0
        else:
            part, rest = self._chunked.feed(data) if data else b"", b""
            self._num_unframed = 0 if part else self._num_unframed + len(data)
            self.is_complete = self._chunked.done
        self._parts.append(part)
        self._num_bytes += len(part)
        self._check(self._num_bytes + max(0, self._num_unframed - _MAX_UNFRAMED))
        return rest

    def whole(self) -> bytes:
        return b"".join(self._parts)

    def _check(self, num_bytes: int) -> None:
        if num_bytes > self._limit:
            raise PayloadTooLarge(f"The request body is over the limit of {self._limit} bytes.")
