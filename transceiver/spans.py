"""Byte spans: what a transport that moves plain memory is told to copy.

Pure arithmetic over arrays. Knows no layouts and no blocks but the size of a unit that must not be cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Spans:
    """Offsets are relative to the first block of each pool."""

    source_offset: Int64s
    destination_offset: Int64s
    length: Int64s

    @property
    def num_bytes(self) -> int:
        return int(self.length.sum())

    def merged(self) -> "Spans":
        """Neighbours on both sides become one span."""
        count = len(self.length)
        if count < 2:
            return self
        source_end = (self.source_offset + self.length)[:-1]
        destination_end = (self.destination_offset + self.length)[:-1]
        apart = (self.source_offset[1:] != source_end) | (self.destination_offset[1:] != destination_end)
        starts = np.flatnonzero(np.r_[True, apart])
        return Spans(
            self.source_offset[starts], self.destination_offset[starts], np.add.reduceat(self.length, starts)
        )

    def pieces(self, max_bytes: int, unit_bytes: int = 1) -> "Spans":
        """The same copy in spans of at most `max_bytes`, cut only between units (a unit is never cut)."""
        step = max(1, max_bytes // unit_bytes) * unit_bytes
        index, inside, length = cut(self.length, step)
        return Spans(self.source_offset[index] + inside, self.destination_offset[index] + inside, length)


def cut(length: Int64s, step: int) -> tuple[Int64s, Int64s, Int64s]:
    """Spans of at most `step` bytes: (which span each comes from, offset inside it, length)."""
    counts = -(-length // step)
    index = np.repeat(np.arange(len(length)), counts)
    inside = (np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)) * step
    return index, inside, np.minimum(length[index] - inside, step)


def batches(length: Int64s, max_bytes: int, max_spans: int) -> Iterator[slice]:
    """Runs of at most `max_spans` spans and `max_bytes` together (a longer span goes alone)."""
    first, batch_bytes = 0, 0
    for i, span_bytes in enumerate(length.tolist()):
        if i > first and (batch_bytes + span_bytes > max_bytes or i - first == max_spans):
            yield slice(first, i)
            first, batch_bytes = i, 0
        batch_bytes += span_bytes
    if first < len(length):
        yield slice(first, len(length))
