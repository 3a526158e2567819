"""The copy plan: which bytes of the owner's pool go where in the reader's pool.

Pure arithmetic over two `KvLayout`s and two block lists. A plan is byte spans relative to the first block of
each pool; it knows no addresses, no transports and no tickets. Today both layouts must be equal, and then one
block is one span; spans can express re-sliced layouts as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import numpy.typing as npt

from diptych.errors import TransferError
from diptych.kv_layout import KvLayout

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CopyPlan:
    """Spans in the order of `destination_blocks`: neighbours on both sides are one span."""

    source_blocks: Int64s
    destination_blocks: Int64s
    source_offset: Int64s
    destination_offset: Int64s
    length: Int64s
    block_bytes: int

    @property
    def num_bytes(self) -> int:
        return int(self.length.sum())

    def pieces(self, max_bytes: int) -> "CopyPlan":
        """The same copy in spans of at most `max_bytes`, cut between blocks (a block is never cut)."""
        step = max(1, max_bytes // self.block_bytes) * self.block_bytes
        index, inside, length = cut(self.length, step)
        return replace(
            self,
            source_offset=self.source_offset[index] + inside,
            destination_offset=self.destination_offset[index] + inside,
            length=length,
        )

    def require_within(self, *, source_blocks: int, destination_blocks: int) -> None:
        """Both pools are large enough; the sizes are in blocks."""
        for side, blocks, limit in (
            ("source", self.source_blocks, source_blocks),
            ("destination", self.destination_blocks, destination_blocks),
        ):
            if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < limit:
                raise TransferError(
                    f"{side} blocks {int(blocks.min())} to {int(blocks.max())} lie outside a pool of {limit}",
                    code="layout",
                )


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


def plan_copy(
    source: KvLayout,
    destination: KvLayout,
    source_blocks: Sequence[int],
    destination_blocks: Sequence[int],
) -> CopyPlan:
    _require_equal(source, destination)
    if len(source_blocks) != len(destination_blocks):
        raise TransferError(
            f"{len(source_blocks)} source blocks cannot fill {len(destination_blocks)} destination blocks",
            code="layout",
        )
    src = np.asarray(source_blocks, np.int64).reshape(-1)
    dst = np.asarray(destination_blocks, np.int64).reshape(-1)
    if len(set(destination_blocks)) != len(dst):
        raise TransferError("a destination block is named twice", code="layout")
    starts = np.flatnonzero(np.r_[True, (np.diff(src) != 1) | (np.diff(dst) != 1)][: len(src)])
    num_blocks = np.diff(np.r_[starts, len(src)])
    block_bytes = source.block_bytes
    return CopyPlan(
        source_blocks=src,
        destination_blocks=dst,
        source_offset=src[starts] * block_bytes,
        destination_offset=dst[starts] * block_bytes,
        length=num_blocks * block_bytes,
        block_bytes=block_bytes,
    )


def _require_equal(source: KvLayout, destination: KvLayout) -> None:
    if source == destination:
        return
    theirs, ours = msgspec.structs.asdict(source), msgspec.structs.asdict(destination)
    differing = ", ".join(
        f"{name} is {theirs[name]!r} there and {ours[name]!r} here"
        for name in theirs
        if theirs[name] != ours[name]
    )
    raise TransferError(f"KV layouts differ: {differing}", code="layout")
