"""Reads the key-value header of a GGUF file, and nothing of its tensors.

The `gguf` package makes a numpy array of every string, which takes seconds for a vocabulary; the header
alone, read straight from the mapped file, takes tens of milliseconds. Little-endian files of version 2 and
3.
"""

import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diptych.errors import ModelLoadError

_MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING = 8
_ARRAY = 9


def read_gguf_metadata(path: Path) -> dict[str, Any]:
    """All keys of the header: numbers, strings, booleans, and lists of those."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path).header()
    except (struct.error, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: the GGUF header is cut short or damaged ({error}).") from error
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read ({error.strerror}).") from error


class _Reader:
    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._path = path
        self._at = 0

    def header(self) -> dict[str, Any]:
        if self._data[:4] != _MAGIC:
            raise ModelLoadError(f"{self._path} is no GGUF file: it does not begin with 'GGUF'.")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise ModelLoadError(f"{self._path} is GGUF version {version}; versions 2 and 3 can be read.")
        self._scalar("Q")  # number of tensors
        num_keys = self._scalar("Q")
        return {self._string(): self._value(self._scalar("I")) for _ in range(num_keys)}

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._at)
        self._at += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        size = self._scalar("Q")
        begin, end = self._at, self._at + size
        if end > len(self._data):
            raise ValueError(f"a string of {size} bytes at offset {begin}")
        self._at = end
        return self._data[begin:end].decode()

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        return self._scalar(self._code(kind))

    def _array(self) -> list[Any]:
        kind = self._scalar("I")
        count = self._scalar("Q")
        if count > len(self._data):
            raise ValueError(f"an array of {count} items at offset {self._at}")
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            return [self._array() for _ in range(count)]
        layout = f"<{count}{self._code(kind)}"
        values = list(struct.unpack_from(layout, self._data, self._at))
        self._at += struct.calcsize(layout)
        return values

    def _strings(self, count: int) -> list[str]:
        """`_string` in a loop, unrolled: vocabularies and merges are most of the header."""
        data, at, limit = self._data, self._at, len(self._data)
        size_of: Callable[[mmap.mmap, int], tuple[Any, ...]] = struct.Struct("<Q").unpack_from
        found = []
        for _ in range(count):
            (size,) = size_of(data, at)
            at += 8
            if at + size > limit:
                raise ValueError(f"a string of {size} bytes at offset {at}")
            found.append(data[at : at + size].decode())
            at += size
        self._at = at
        return found

    def _code(self, kind: int) -> str:
        code = _SCALARS.get(kind)
        if code is None:
            raise ValueError(f"value type {kind} at offset {self._at}")
        return code
