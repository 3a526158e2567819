"""The seam between the transceiver and the ways bytes travel, and the table of those ways.

A transport proves by itself whether it can reach a peer (`connect` raises `Unreachable` with the reason when
not); nobody configures that. It moves the bytes of a `CopyPlan` and reports the owner's generation numbers as
they were after the last byte had left; it knows nothing of tickets, leases, digests or retries.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from diptych.errors import ConfigError, TransferError
from diptych.transceiver.plan import CopyPlan
from diptych.transceiver.pool import Bytes, DigestKind, Digests, Generations, KvPool
from diptych.transceiver.pool_memory import PoolIdentity
from diptych.transceiver.server import Server
from diptych.transceiver.stop import Stop

# Name in settings and tickets -> class, imported on use.
TRANSPORTS = {
    "shm": "diptych.transceiver.shm:ShmTransport",
    "cuda_ipc": "diptych.transceiver.cuda_ipc:CudaIpcTransport",
    "tcp": "diptych.transceiver.tcp:TcpTransport",
    "nixl": "diptych.transceiver.nixl.transport:NixlTransport",
    "ucx": "diptych.transceiver.ucx:UcxTransport",
}

# Called as bytes land in host memory: offset in the destination pool, and the bytes there; each once, and whole
# blocks when the plan copies whole blocks. On the copying thread.
Landed = Callable[[int, Bytes], None]

PROBE_BYTES = 8 << 20  # of one copy of a measurement; a GPU's link needs more to show its speed
_PROBE_PATIENCE_S = 10.0  # with a copy that lingers
_PROBE_S, _MIN_PROBES, _MAX_PROBES = 0.01, 3, 50


class TransferState(Enum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    ABORTED = "aborted"


class Unreachable(Exception):
    """This transport cannot serve this peer. `remedy` is set when the operator would expect it to."""

    def __init__(self, reason: str, *, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class TransportContext:
    """What a transport is built from. Transports that need a port of their owner share the transceiver's
    server.
    """

    server: Server
    secret: bytes | None = None
    send_timeout_s: float = 30.0
    copy_programs: int = 32


class Peer(Protocol):
    """A proven way to one owner's pool."""

    @property
    def reason(self) -> str:
        """Why this transport serves this peer, for the log."""
        ...


class Transfer(Protocol):
    """One copy. It makes progress inside `wait`, on the thread that calls it (or, once started, on a GPU):
    `wait` must be called, also after an abort.
    """

    @property
    def state(self) -> TransferState: ...

    @property
    def bytes(self) -> int: ...

    @property
    def seconds(self) -> float: ...

    @property
    def generations(self) -> Generations:
        """Of the plan's source blocks, in its order, read by or from the owner after the copy. Only when
        done.
        """
        ...

    @property
    def digests(self) -> Digests | None:
        """Of the plan's source blocks, in its order, over what was copied of them, when the transport computed
        them itself; None: what landed has to be looked at.
        """
        ...

    @property
    def lingers(self) -> bool:
        """`wait` has raised and the destination may still be written to, until `settle` returns."""
        ...

    def wait(self) -> None:
        """Copy. When it returns or raises TransferError, the destination is no longer written to, unless the
        transfer lingers.
        """
        ...

    def settle(self, patience_s: float) -> None:
        """Wait until the destination is no longer written to; after so long, or when the owner is forgotten,
        make sure of it.
        """
        ...

    def abort(self) -> None:
        """From any thread, never blocks; `wait` raises soon."""
        ...


class Transport(Protocol):
    name: str

    def register(self, memory: KvPool) -> bytes:
        """Once, before anything else; the descriptor is what `connect` takes in another process."""
        ...

    def connect(self, descriptor: bytes, stop: Stop) -> Peer:
        """Idempotent. Raises Unreachable, or TransferError when the peer is known to be gone."""
        ...

    def start(
        self, peer: Peer, plan: CopyPlan, stop: Stop, landed: Landed, digest_kind: DigestKind | None
    ) -> Transfer:
        """`digest_kind` is what the ticket's digests are; None: they need not be checked."""
        ...

    def measure(self, peer: Peer, stop: Stop) -> float:
        """GB/s of copies of some of the peer's blocks into memory that nobody uses: the best of several."""
        ...

    def forget(self, incarnation: str) -> None:
        """The owner is gone: let go of its memory and connections as soon as running transfers end."""
        ...

    def close(self) -> None: ...


def load(name: str, context: TransportContext) -> Transport:
    path = TRANSPORTS.get(name)
    if path is None:
        raise ConfigError(f"KV transport is {name!r}, allowed are {', '.join(TRANSPORTS)}")
    module, _, attribute = path.partition(":")
    transport: Transport = getattr(importlib.import_module(module), attribute)(context)
    return transport


def probe_plan(source: PoolIdentity, num_bytes: int) -> CopyPlan:
    """The first blocks of a pool, about so many bytes, to the start of a memory."""
    count = min(source.num_blocks, max(1, num_bytes // source.block_bytes))
    blocks = np.arange(count)
    return CopyPlan(
        positions=blocks,
        source_blocks=blocks,
        destination_blocks=blocks,
        row_block=blocks,
        row_source=blocks * source.block_bytes,
        row_destination=blocks * source.block_bytes,
        cell_source=np.zeros(1, np.int64),
        cell_destination=np.zeros(1, np.int64),
        length=source.block_bytes,
        source_block_bytes=source.block_bytes,
        destination_block_bytes=source.block_bytes,
    )


def fastest(start: Callable[[], Transfer], clock: Callable[[], float] = time.monotonic) -> float:
    """GB/s of the best of several copies: the first pays for page tables, any may wait for a busy core."""
    best, count, until = 0.0, 0, clock() + _PROBE_S
    while count < _MIN_PROBES or (clock() < until and count < _MAX_PROBES):
        transfer = start()
        try:
            transfer.wait()
        except TransferError:
            transfer.settle(_PROBE_PATIENCE_S)
            raise
        best = max(best, transfer.bytes / transfer.seconds / 1e9)
        count += 1
    return best


def ignore_landed(offset: int, data: Bytes) -> None:
    """Nobody wants to look at it."""
