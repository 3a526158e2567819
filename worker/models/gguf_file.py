"""Reads GGUF files: the header in milliseconds, tensors dequantized one at a time.

The `gguf` package knows the number formats; its reader also turns every vocabulary entry into Python objects,
which takes seconds and is of no use to a model, so the header is parsed here. Arrays of strings are skipped.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diptych.errors import ModelLoadError

_SCALARS: dict[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    shape: tuple[int, ...]  # rows first, as in torch
    kind: int  # the number of the quantization type in GGUF
    offset: int  # from the start of the file


@dataclass(frozen=True, slots=True)
class GgufFile:
    path: Path
    metadata: Mapping[str, Any]  # scalars, strings and arrays of scalars
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> "GgufFile":
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Header(path, data).read()
        except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
            raise ModelLoadError(f"{path} cannot be read as a GGUF file: {error}.") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    def has(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def read(self, name: str, axis: int = 0, cut: range | None = None) -> Tensor:
        """The tensor, dequantized, in float32; `cut`: only these indices along `axis`."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        info = self._info(name)
        try:
            kind = GGMLQuantizationType(info.kind)
            items, item_bytes = GGML_QUANT_SIZES[kind]
            raw = self._bytes(name, info, math.prod(info.shape) // items * item_bytes)
            rows = raw.reshape(*info.shape[:-1], -1)
            # Along the last axis numbers are packed in blocks that a cut may go through.
            if cut is not None and axis < len(info.shape) - 1:
                rows, cut = rows[(slice(None),) * axis + (slice(cut.start, cut.stop),)], None
            values = dequantize(rows, kind)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ModelLoadError(
                f"Tensor {name} of {self.path} has a number format that cannot be dequantized: {error}."
            ) from error
        tensor = torch.from_numpy(np.require(values, np.float32, ("C", "W")))
        return tensor if cut is None else tensor.narrow(axis, cut.start, len(cut))

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ModelLoadError(f"{self.path} has no tensor {name}.")
        return self.tensors[name]

    def _bytes(self, name: str, info: TensorInfo, count: int) -> npt.NDArray[np.uint8]:
        raw = np.fromfile(self.path, np.uint8, count, offset=info.offset)
        if len(raw) < count:
            raise ModelLoadError(f"{self.path} is truncated: it ends inside tensor {name}.")
        return raw


class _Header:
    """A cursor over the header; `read` walks it once."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def read(self) -> GgufFile:
        if self._data[:4] != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
        self._at = 4
        version, num_tensors, num_fields = self._unpack("<IQQ")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 are known")
        metadata = {}
        for _ in range(num_fields):
            key = self._string()
            metadata[key] = self._value(self._unpack("<I")[0])
        infos = [self._tensor() for _ in range(num_tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-self._at // alignment) * alignment
        tensors = {name: TensorInfo(shape, kind, start + offset) for name, shape, kind, offset in infos}
        return GgufFile(self._path, metadata, tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        (num_axes,) = self._unpack("<I")
        axes = self._unpack(f"<{num_axes}Q")
        kind, offset = self._unpack("<IQ")
        return name, tuple(reversed(axes)), kind, offset

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        return self._unpack("<" + self._scalar(kind))[0]

    def _array(self) -> tuple[Any, ...] | None:
        kind, length = self._unpack("<IQ")
        if kind == _STRING:
            self._skip_strings(length)
            return None
        if kind == _ARRAY:
            return tuple(self._array() for _ in range(length))
        return self._unpack(f"<{length}{self._scalar(kind)}")

    def _skip_strings(self, count: int) -> None:
        data, at, read_length = self._data, self._at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + read_length(data, at)[0]
        self._at = at

    def _string(self) -> str:
        (length,) = self._unpack("<Q")
        if self._at + length > len(self._data):
            raise ValueError("it is truncated inside its header")
        text = self._data[self._at : self._at + length].decode()
        self._at += length
        return text

    def _scalar(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise ValueError(f"its header has a value of the unknown type {kind}")
        return _SCALARS[kind]

    def _unpack(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return values
