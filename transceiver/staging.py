"""How a pool's bytes meet a socket: host memory directly, a GPU's through device_staging.py.

Knows nothing of connections or of what the bytes are.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from diptych.transceiver.plan import CopyPlan
from diptych.transceiver.pool import Bytes, DigestKind, Digests, KvPool
from diptych.transceiver.pool_memory import PoolMemory
from diptych.transceiver.spans import Int64s, batches

BATCH_BYTES = 4 << 20
MAX_SPANS = 512  # of one batch


class Outlet(Protocol):
    """For one connection at a time."""

    def batches(self, offsets: Int64s, lengths: Int64s) -> Iterator[list[Bytes]]:
        """The bytes of these spans, none longer than BATCH_BYTES; a batch is valid until the next one."""
        ...


class Inlet(Protocol):
    """For one transfer: `take`, fill, `put`, and so on; `finish` when all is there; `settle` in any case."""

    def take(self, offsets: Int64s, lengths: Int64s) -> list[Bytes]:
        """Where the bytes of these spans go: of one batch, or of one block that is larger."""
        ...

    def put(self) -> None:
        """What was taken last is filled."""
        ...

    def digests(self, plan: CopyPlan, digest_kind: DigestKind | None) -> bool:
        """Whether `finish` will give digests: nobody need look at what lands then."""
        ...

    def finish(self, plan: CopyPlan, digest_kind: DigestKind | None) -> Digests | None:
        """All bytes are in the pool; their digests, when the pool's own device can compute them."""
        ...

    def settle(self) -> None:
        """Returns when nothing is written to the pool any more."""
        ...


def outlet_of(memory: KvPool) -> Outlet:
    if isinstance(memory, PoolMemory):
        return HostOutlet(memory.data)
    from diptych.transceiver.device_pool import DevicePool
    from diptych.transceiver.device_staging import DeviceOutlet

    assert isinstance(memory, DevicePool)
    return DeviceOutlet(memory)


def inlet_of(memory: KvPool) -> Inlet:
    if isinstance(memory, PoolMemory):
        return HostInlet(memory.data)
    from diptych.transceiver.device_pool import DevicePool
    from diptych.transceiver.device_staging import DeviceInlet

    assert isinstance(memory, DevicePool)
    return DeviceInlet(memory)


class HostOutlet:
    def __init__(self, data: Bytes) -> None:
        self._data = data

    def batches(self, offsets: Int64s, lengths: Int64s) -> Iterator[list[Bytes]]:
        for batch in batches(lengths, BATCH_BYTES, MAX_SPANS):
            yield _slices(self._data, offsets[batch], lengths[batch])


class HostInlet:
    """Also for a scratch array that is no pool."""

    def __init__(self, data: Bytes) -> None:
        self._data = data

    def take(self, offsets: Int64s, lengths: Int64s) -> list[Bytes]:
        return _slices(self._data, offsets, lengths)

    def put(self) -> None:
        """It is where it belongs already."""

    def digests(self, plan: CopyPlan, digest_kind: DigestKind | None) -> bool:
        return False

    def finish(self, plan: CopyPlan, digest_kind: DigestKind | None) -> Digests | None:
        return None  # they were looked at as they landed

    def settle(self) -> None:
        """The socket wrote straight into the pool and has stopped."""


def _slices(data: Bytes, offsets: Int64s, lengths: Int64s) -> list[Bytes]:
    return [
        data[start : start + count] for start, count in zip(offsets.tolist(), lengths.tolist(), strict=True)
    ]


def packed(lengths: Int64s) -> list[slice]:
    """Where spans of these lengths lie when they are put one after the other."""
    ends = np.cumsum(lengths)
    return [slice(end - count, end) for end, count in zip(ends.tolist(), lengths.tolist(), strict=True)]
