"""The memory of one rank's KV pool: a memfd that other processes of the host can map and check.

    | header page | generation numbers: uint64 [num_blocks] | blocks: uint8 [num_blocks, block_bytes] |

each padded to whole pages.

The header says whose memory this is, so that a peer that opened a recycled pid or descriptor finds out before
it reads a block. Knows nothing of torch, of transports, or of who uses which block: the scheduler's block
pool owns the generation numbers and bumps one before it writes a reused block.
"""

import contextlib
import fcntl
import mmap
import os
import struct
import time

import msgspec
import numpy as np
import numpy.typing as npt

from diptych.errors import StartupError, TransferError
from diptych.kv_layout import KvLayout

MAGIC = b"DIPTYCHK"
VERSION = 1
MEMFD_NAME = "diptych-kv-pool"

_HEADER = struct.Struct("<8sI64s16sQQ")  # magic, version, incarnation, fingerprint, num_blocks, block_bytes
_PAGE = mmap.PAGESIZE
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW

Bytes = npt.NDArray[np.uint8]
Generations = npt.NDArray[np.uint64]


class PoolIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a pool this pool and no other: equal identities mean the same memory of the same process."""

    incarnation: str
    fingerprint: str
    num_blocks: int
    block_bytes: int

    def pack(self) -> bytes:
        incarnation = self.incarnation.encode()
        if not 0 < len(incarnation) <= 64:
            raise StartupError(f"incarnation is {len(incarnation)} bytes long, allowed are 1 to 64")
        return _HEADER.pack(
            MAGIC, VERSION, incarnation, self.fingerprint.encode(), self.num_blocks, self.block_bytes
        )

    @property
    def blocks_offset(self) -> int:
        return _PAGE + _whole_pages(8 * self.num_blocks)

    @property
    def total_bytes(self) -> int:
        return self.blocks_offset + _whole_pages(self.num_blocks * self.block_bytes)


class PoolView:
    """Arrays over a mapped pool; the mapping lives as long as one of its arrays."""

    def __init__(self, mapping: mmap.mmap, identity: PoolIdentity) -> None:
        start, num_bytes = identity.blocks_offset, identity.num_blocks * identity.block_bytes
        self.identity = identity
        self.data: Bytes = np.frombuffer(mapping, np.uint8, num_bytes, start)
        self.blocks: Bytes = self.data.reshape(identity.num_blocks, identity.block_bytes)
        self.generations: Generations = np.frombuffer(mapping, np.uint64, identity.num_blocks, _PAGE)


class PoolMemory(PoolView):
    """The owner's side: creates the memfd and touches every page, so that no transfer pays for page faults.

    `populate_s` is what the touching took. `close` gives up the descriptor; the pages go when the last array
    over them (here, in torch, or in a peer's mapping) is gone.
    """

    def __init__(self, fd: int, mapping: mmap.mmap, identity: PoolIdentity, populate_s: float) -> None:
        super().__init__(mapping, identity)
        self.fd = fd
        self.populate_s = populate_s
        self._mapping: mmap.mmap | None = mapping

    @classmethod
    def create(cls, layout: KvLayout, num_blocks: int, incarnation: str) -> "PoolMemory":
        if num_blocks < 1:
            raise StartupError(f"num_blocks is {num_blocks}, allowed is 1 or more")
        identity = PoolIdentity(
            incarnation=incarnation,
            fingerprint=layout.fingerprint(),
            num_blocks=num_blocks,
            block_bytes=layout.block_bytes,
        )
        header = identity.pack()
        fd = os.memfd_create(MEMFD_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, identity.total_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)  # a peer's mapping can never lose its pages
            started = time.monotonic()
            mapping = _map_populated(fd, identity.total_bytes)
        except (OSError, ValueError, OverflowError) as error:
            os.close(fd)
            size = identity.total_bytes / 2**30
            raise StartupError(
                f"a KV pool of {num_blocks} blocks needs {size:.2f} GiB, the system refused: {error}"
            ) from error
        mapping[: len(header)] = header
        return cls(fd, mapping, identity, time.monotonic() - started)

    def close(self) -> None:
        if self._mapping is None:
            return
        os.close(self.fd)
        self._mapping = None
        self.data, self.generations = np.empty(0, np.uint8), np.empty(0, np.uint64)
        self.blocks = self.data.reshape(0, self.identity.block_bytes)


def open_pool(fd: int, identity: PoolIdentity) -> PoolView:
    """Map another process's pool read-only, or say why this descriptor is not that pool."""
    size = os.fstat(fd).st_size
    if size != identity.total_bytes:
        raise TransferError(
            f"pool memory is {size} bytes long, expected {identity.total_bytes}", code="peer_gone"
        )
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS == _SEALS
    except OSError:
        sealed = False
    if not sealed:
        raise TransferError("the descriptor is not a sealed memfd of a KV pool", code="peer_gone")
    mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    expected = identity.pack()
    if mapping[: len(expected)] != expected:
        mapping.close()
        raise TransferError(
            f"pool memory is not that of incarnation {identity.incarnation}", code="peer_gone"
        )
    return PoolView(mapping, identity)


def _map_populated(fd: int, size: int) -> mmap.mmap:
    mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
    with contextlib.suppress(OSError):  # huge pages where the host allows them for shared memory
        mapping.madvise(mmap.MADV_HUGEPAGE)
    # Writing one byte a page is what MAP_POPULATE does, and lets the advice above take effect first.
    np.frombuffer(mapping, np.uint8)[::_PAGE] = 0
    return mapping


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE
