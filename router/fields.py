"""Header fields of an HTTP/1.1 head. They are searched in place: few of them are ever looked at. Pure."""

from functools import lru_cache
from typing import Protocol


class Headers(Protocol):
    def get(self, name: str, /) -> str | None:
        """The first field of this name."""


class Fields:
    """The lines of a head after its first one."""

    __slots__ = ("_lower", "_raw")

    def __init__(self, raw: bytes) -> None:
        """`raw`: the whole head, without the empty line at its end."""
        self._raw = raw
        self._lower = raw.lower()

    def get(self, name: str) -> str | None:
        """The first field of this name, which may be in any case."""
        value = self.find(needle(name))
        return None if value is None else value.decode("latin-1")

    def find(self, of: bytes) -> bytes | None:
        """The same for a `needle` that is made already, and as bytes."""
        start = self._lower.find(of)
        if start < 0:
            return None
        start += len(of)
        end = self._raw.find(b"\r\n", start)
        return self._raw[start : len(self._raw) if end < 0 else end].strip(b" \t")


@lru_cache(maxsize=64)
def needle(name: str) -> bytes:
    """What a field of this name begins with."""
    return b"\r\n%b:" % name.lower().encode("latin-1")
