"""Transport within a host: the reader maps the owner's pool memory and copies; the owner's CPU takes no part.

Needs the same boot of the same host, the same pid namespace and the right to open the owner's descriptor;
what decides is the header of the memory itself. Works while the owner is stopped; after its death as long as
the mapping lives, which `forget` ends.
"""

import os
import threading
import time

import msgspec
import numpy as np

from diptych.errors import TransferError
from diptych.transceiver.plan import CopyPlan
from diptych.transceiver.pool_memory import (
    MEMFD_NAME,
    Bytes,
    Generations,
    PoolIdentity,
    PoolMemory,
    PoolView,
    open_pool,
)
from diptych.transceiver.stop import Stop
from diptych.transceiver.transport import Landed, TransferState, TransportContext, Unreachable

# Small enough that the digest of a piece still finds it in a core's cache.
PIECE_BYTES = 1 << 20


class ShmRegion(msgspec.Struct, frozen=True, kw_only=True):
    identity: PoolIdentity
    boot_id: str
    pid_namespace: str
    pid: int
    fd: int


class ShmPeer:
    def __init__(self, view: PoolView) -> None:
        self.view = view
        self.reason = "same host"


class ShmTransfer:
    def __init__(
        self, view: PoolView, destination: Bytes, plan: CopyPlan, stop: Stop, landed: Landed
    ) -> None:
        self._view = view
        self._destination = destination
        self._plan = plan.pieces(PIECE_BYTES)
        self._stop = stop
        self._landed = landed
        self.state = TransferState.RUNNING
        self.bytes = 0
        self.seconds = 0.0
        self.generations: Generations = np.empty(0, np.uint64)

    def wait(self) -> None:
        started = time.monotonic()
        try:
            self._copy()
        except TransferError:
            self.state = TransferState.ABORTED if self._stop.aborted else TransferState.FAILED
            raise
        finally:
            self.seconds = time.monotonic() - started
        self.state = TransferState.DONE

    def abort(self) -> None:
        self._stop.abort()

    def _copy(self) -> None:
        source, destination, plan = self._view.data, self._destination, self._plan
        for src, dst, length in zip(
            plan.source_offset.tolist(), plan.destination_offset.tolist(), plan.length.tolist(), strict=True
        ):
            self._stop.check()
            np.copyto(destination[dst : dst + length], source[src : src + length])  # without the GIL
            self._landed(dst, length)
            self.bytes += length
        self.generations = self._view.generations[plan.source_blocks]


class ShmTransport:
    name = "shm"

    def __init__(self, context: TransportContext) -> None:
        self._memory: PoolMemory | None = None
        self._lock = threading.Lock()
        self._peers: dict[bytes, ShmPeer] = {}  # by descriptor

    def register(self, memory: PoolMemory) -> bytes:
        self._memory = memory
        region = ShmRegion(
            identity=memory.identity,
            boot_id=_boot_id(),
            pid_namespace=_pid_namespace(),
            pid=os.getpid(),
            fd=memory.fd,
        )
        return msgspec.msgpack.encode(region)

    def connect(self, descriptor: bytes, stop: Stop) -> ShmPeer:
        try:
            region = msgspec.msgpack.decode(descriptor, type=ShmRegion)
        except msgspec.MsgspecError as error:
            raise TransferError(f"shm region cannot be read: {error}", code="layout") from error
        with self._lock:
            peer = self._peers.get(descriptor)
            if peer is None:
                peer = self._peers[descriptor] = ShmPeer(_map(region))
            return peer

    def start(self, peer: ShmPeer, plan: CopyPlan, stop: Stop, landed: Landed) -> ShmTransfer:
        assert self._memory is not None, "start before register"
        plan.require_within(
            source_blocks=peer.view.identity.num_blocks,
            destination_blocks=self._memory.identity.num_blocks,
        )
        return ShmTransfer(peer.view, self._memory.data, plan, stop, landed)

    def forget(self, incarnation: str) -> None:
        with self._lock:
            for descriptor, peer in list(self._peers.items()):
                if peer.view.identity.incarnation == incarnation:
                    del self._peers[descriptor]

    def close(self) -> None:
        with self._lock:
            self._peers.clear()


def _map(region: ShmRegion) -> PoolView:
    if region.boot_id != _boot_id():
        raise Unreachable("it is on another host")
    if region.pid_namespace != _pid_namespace():
        raise Unreachable(
            "it is on the same host in another pid namespace",
            remedy="let the two containers share one (docker: --pid=container:NAME or --pid=host; "
            'compose: pid: "service:NAME"; kubernetes: shareProcessNamespace)',
        )
    path = f"/proc/{region.pid}/fd/{region.fd}"
    try:
        # Looked at before it is opened: opening somebody else's device or pipe could have effects.
        if not os.readlink(path).startswith(f"/memfd:{MEMFD_NAME}"):
            raise TransferError(f"{path} is not a KV pool", code="peer_gone")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as error:
        raise Unreachable(
            f"it is on the same host, but {path} may not be opened: {error.strerror}",
            remedy="run both workers as the same user with the same capabilities",
        ) from error
    except OSError as error:
        raise Unreachable(f"process {region.pid} is gone") from error
    try:
        return open_pool(fd, region.identity)
    finally:
        os.close(fd)


def _boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _pid_namespace() -> str:
    return os.readlink("/proc/self/ns/pid")
