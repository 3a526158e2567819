"""The memory of one rank's KV pool: a memfd that other processes of the host can map and check.

    | header page | generation numbers: uint64 [num_blocks] | blocks: uint8 [num_blocks, block_bytes] |

each padded to whole pages. A pool on a GPU (device_pool.py) has the first two here and its blocks there.

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
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import xxhash

from diptych.errors import StartupError, TransferError
from diptych.kv_layout import KvLayout
from diptych.transceiver.pool import Bytes, DigestKind, Generations

MAGIC = b"DIPTYCHK"
VERSION = 1
MEMFD_NAME = "diptych-kv-pool"

_HEADER = struct.Struct("<8sI64s16sQQ")  # magic, version, incarnation, fingerprint, num_blocks, block_bytes
_PAGE = mmap.PAGESIZE
_NOTE_OFFSET, _NOTE_BYTES = 512, 128  # in the header page
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class PoolIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a pool this pool and no other: equal identities mean the same memory of the same process."""

    incarnation: str
    fingerprint: str
    num_blocks: int
    block_bytes: int
    on_device: bool = False  # the blocks are not in the memfd

    def pack(self) -> bytes:
        incarnation = self.incarnation.encode()
        if not 0 < len(incarnation) <= 64:
            raise StartupError(f"incarnation is {len(incarnation)} bytes long, allowed are 1 to 64")
        return _HEADER.pack(
            MAGIC, VERSION, incarnation, self.fingerprint.encode(), self.num_blocks, self.block_bytes
        )

    @classmethod
    def of(cls, layout: KvLayout, num_blocks: int, incarnation: str, *, on_device: bool) -> "PoolIdentity":
        if num_blocks < 1:
            raise StartupError(f"num_blocks is {num_blocks}, allowed is 1 or more")
        return cls(
            incarnation=incarnation,
            fingerprint=layout.fingerprint(),
            num_blocks=num_blocks,
            block_bytes=layout.block_bytes,
            on_device=on_device,
        )

    @property
    def blocks_offset(self) -> int:
        return _PAGE + _whole_pages(8 * self.num_blocks)

    @property
    def total_bytes(self) -> int:
        return self.blocks_offset + _whole_pages(self.host_bytes)

    @property
    def host_bytes(self) -> int:
        """Of the blocks."""
        return 0 if self.on_device else self.num_blocks * self.block_bytes


@dataclass(frozen=True, slots=True)
class PoolFile:
    """A new memfd for a pool, with its header, mapped here."""

    fd: int
    mapping: mmap.mmap
    populate_s: float

    @classmethod
    def create(cls, identity: PoolIdentity) -> "PoolFile":
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
                f"a KV pool of {identity.num_blocks} blocks needs {size:.2f} GiB, the system refused: {error}"
            ) from error
        mapping[: len(header)] = header
        return cls(fd, mapping, time.monotonic() - started)


class PoolView:
    """Arrays over a mapped pool; the mapping lives as long as one of its arrays."""

    def __init__(self, mapping: mmap.mmap, identity: PoolIdentity) -> None:
        self.identity = identity
        self.data: Bytes = np.frombuffer(mapping, np.uint8)[identity.blocks_offset :][: identity.host_bytes]
        self.blocks: Bytes = self.data.reshape(-1, identity.block_bytes)
        self.generations: Generations = np.frombuffer(mapping, np.uint64, identity.num_blocks, _PAGE)
        # What the owner's device wants its peers to know: worth as much as the header.
        self.note: Bytes = np.frombuffer(mapping, np.uint8, _NOTE_BYTES, _NOTE_OFFSET)


class PoolMemory(PoolView):
    """The owner's side of a pool in host memory: every page is touched, so that no transfer pays for page faults.

    `populate_s` is what the touching took. `close` gives up the descriptor; the pages go when the last array
    over them (here, in torch, or in a peer's mapping) is gone.
    """

    digest_kind: DigestKind = "xxh3_64"

    def __init__(self, file: PoolFile, identity: PoolIdentity) -> None:
        super().__init__(file.mapping, identity)
        self.fd = file.fd
        self.populate_s = file.populate_s
        self._open = True

    @classmethod
    def create(cls, layout: KvLayout, num_blocks: int, incarnation: str) -> "PoolMemory":
        identity = PoolIdentity.of(layout, num_blocks, incarnation, on_device=False)
        return cls(PoolFile.create(identity), identity)

    def digest(self, block_ids: Sequence[int]) -> list[int]:
        return [xxhash.xxh3_64_intdigest(self.blocks[block].data) for block in block_ids]

    def close(self) -> None:
        if not self._open:
            return
        os.close(self.fd)
        self._open = False
        self.data, self.note, self.generations = (
            np.empty(0, np.uint8),
            np.empty(0, np.uint8),
            np.empty(0, np.uint64),
        )
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


def share_generations(pid: int, fd: int, identity: PoolIdentity) -> Generations:
    """The generation numbers of a pool of another process of ours, to be written here. Raises OSError."""
    file = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        mapping = mmap.mmap(file, identity.blocks_offset, flags=mmap.MAP_SHARED)
    finally:
        os.close(file)
    generations: Generations = np.frombuffer(mapping, np.uint64, identity.num_blocks, _PAGE)
    return generations


def _map_populated(fd: int, size: int) -> mmap.mmap:
    mapping = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
    with contextlib.suppress(OSError):  # huge pages where the host allows them for shared memory
        mapping.madvise(mmap.MADV_HUGEPAGE)
    # Writing one byte a page is what MAP_POPULATE does, and lets the advice above take effect first.
    np.frombuffer(mapping, np.uint8)[::_PAGE] = 0
    return mapping


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE) * _PAGE
