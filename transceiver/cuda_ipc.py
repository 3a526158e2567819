"""Transport between GPUs of one host: the reader's GPU reads the owner's pool through a CUDA IPC handle.

The owner's process takes no part. One kernel on a stream of its own copies scattered blocks, re-slices and
digests them on the way; the number of its programs is bounded, so that the model goes on computing beside it.
Whose memory it is, and whether blocks were reused meanwhile, the owner's pool file in host memory tells. Each
process need see only its own GPU. A mapping is closed when its owner is gone and no copy reads it any more.
"""

import logging
import math
import os
import time
import weakref

import msgspec
import numpy as np
import torch

from diptych.errors import ConfigError, TransferError
from diptych.kernels.block_copy import ALIGN_BYTES, CopyGrid
from diptych.transceiver.cuda_driver import CudaDriver, DriverError
from diptych.transceiver.device_copy import DeviceCopier
from diptych.transceiver.device_pool import NOTE, DevicePool
from diptych.transceiver.host_region import HostRegion
from diptych.transceiver.outcome import Outcome
from diptych.transceiver.peers import Peers
from diptych.transceiver.plan import CopyPlan
from diptych.transceiver.pool import DigestKind, KvPool
from diptych.transceiver.pool_memory import PoolView
from diptych.transceiver.stop import Stop
from diptych.transceiver.timer import sharpen_timer
from diptych.transceiver.transport import (
    Landed,
    TransferState,
    TransportContext,
    Unreachable,
    fastest,
    probe_plan,
)

log = logging.getLogger(__name__)

_POLL_S = 10e-6
_LOOK_S = 200e-6  # for so long, when a copy may be done, without sleeping: that ends late
_PROBE_BYTES = 64 << 20

_REMEDIES = {
    "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED": "put both workers on GPUs that `nvidia-smi topo -p2p r` shows as OK",
    "CUDA_ERROR_TOO_MANY_PEERS": "let fewer GPUs exchange KV with this one",
}
_REMEDY = "let both workers share the host's IPC and pid namespaces (docker: --ipc=host --pid=host)"


class CudaIpcPeer:
    """Another pool's memory, as this process's GPU addresses it."""

    def __init__(self, view: PoolView, pointer: int) -> None:
        self.view = view
        self.pointer = pointer
        self.reason = "both GPUs are on this host"
        self.pace = math.inf  # seconds a byte of the fastest copy so far


class CudaIpcTransfer(Outcome):
    """One kernel launch: it cannot be stopped, so an abort takes effect when it is done, milliseconds later."""

    def __init__(
        self,
        peer: CudaIpcPeer,
        copier: DeviceCopier,
        destination: torch.Tensor,
        plan: CopyPlan,
        grid: CopyGrid,
        stop: Stop,
        *,
        digest: bool,
    ) -> None:
        super().__init__(stop)
        self._peer = peer  # keeps its memory mapped
        self._copier = copier
        self._plan = plan
        self._digest = digest
        stop.check()
        self._started = time.monotonic()
        try:
            self._running = copier.start(peer.pointer, destination.data_ptr(), grid, digest=digest)
        except (RuntimeError, DriverError) as error:
            raise _gpu_failure(error) from error

    def wait(self) -> None:
        try:
            self._settle()
            self.seconds = time.monotonic() - self._started
            self._peer.pace = min(self._peer.pace, self.seconds / max(1, self._plan.num_bytes))
            self._stop.check()
            self.generations = self._peer.view.generations[self._plan.source_blocks]
        except TransferError:
            self._fail()
            raise
        self.bytes = self._plan.num_bytes
        self.state = TransferState.DONE

    def _settle(self) -> None:
        """Until the GPU writes no more. No deadline: what it may still write to is nobody else's before that."""
        due = self._started + self._plan.num_bytes * self._peer.pace
        try:
            while not self._running.done.query():
                late = time.monotonic() - due
                time.sleep(0.0 if -2 * _POLL_S < late < _LOOK_S else _POLL_S)
        except RuntimeError as error:
            raise _gpu_failure(error) from error
        digests = self._copier.finish(self._running)
        self.digests = digests if self._digest else None


class CudaIpcTransport:
    name = "cuda_ipc"

    def __init__(self, context: TransportContext) -> None:
        self._num_programs = context.copy_programs
        self._memory: DevicePool | None = None
        self._copier: DeviceCopier | None = None
        self._peers: Peers[CudaIpcPeer] = Peers()

    def register(self, memory: KvPool) -> bytes:
        if not isinstance(memory, DevicePool):
            raise ConfigError("KV transport cuda_ipc copies between pools on GPUs, and this pool is not")
        self._memory = memory
        self._copier = DeviceCopier(memory.driver, memory.device, self._num_programs)
        self._compile(memory, self._copier)
        return HostRegion.of(memory).encode()

    def connect(self, descriptor: bytes, stop: Stop) -> CudaIpcPeer:
        assert self._memory is not None, "connect before register"
        region, driver = HostRegion.decode(descriptor), self._memory.driver
        return self._peers.add(descriptor, region.identity.incarnation, lambda: _open(region, driver))

    def start(
        self,
        peer: CudaIpcPeer,
        plan: CopyPlan,
        stop: Stop,
        landed: Landed,
        digest_kind: DigestKind | None,
    ) -> CudaIpcTransfer:
        assert self._memory is not None, "start before register"
        plan.require_within(
            source_blocks=peer.view.identity.num_blocks,
            destination_blocks=self._memory.identity.num_blocks,
        )
        grid = grid_of(plan)
        if not grid.is_aligned:
            raise Unreachable(
                f"its blocks would be cut into pieces that are no multiple of {ALIGN_BYTES} bytes"
            )
        sharpen_timer()
        return self._transfer(peer, self._memory.tensor, plan, grid, stop, digest=digest_kind is not None)

    def measure(self, peer: CudaIpcPeer, stop: Stop) -> float:
        assert self._copier is not None, "measure before register"
        plan = probe_plan(peer.view.identity, _PROBE_BYTES)
        scratch, grid = self._copier.scratch(plan.num_bytes), grid_of(plan)
        sharpen_timer()
        return fastest(lambda: self._transfer(peer, scratch, plan, grid, stop, digest=False))

    def forget(self, incarnation: str) -> None:
        self._peers.forget(incarnation)

    def close(self) -> None:
        self._peers.clear()

    def _transfer(
        self,
        peer: CudaIpcPeer,
        destination: torch.Tensor,
        plan: CopyPlan,
        grid: CopyGrid,
        stop: Stop,
        *,
        digest: bool,
    ) -> CudaIpcTransfer:
        assert self._copier is not None
        return CudaIpcTransfer(peer, self._copier, destination, plan, grid, stop, digest=digest)

    def _compile(self, memory: DevicePool, copier: DeviceCopier) -> None:
        """The kernel of the usual case, now: compiling it in the first fetch would take a second of that."""
        identity = msgspec.structs.replace(memory.identity, num_blocks=1)
        pair = torch.zeros(2, identity.block_bytes, dtype=torch.uint8, device=memory.device)
        grid = grid_of(probe_plan(identity, 1))
        for digest in (True, False):
            running = copier.start(pair[1].data_ptr(), pair[0].data_ptr(), grid, digest=digest)
            running.done.synchronize()
            copier.finish(running)


def grid_of(plan: CopyPlan) -> CopyGrid:
    inside = plan.row_source % plan.source_block_bytes
    rows = np.concatenate((plan.row_source, plan.row_destination, inside, plan.row_block)).reshape(4, -1)
    return CopyGrid.of(
        rows, plan.cell_source, plan.cell_destination, plan.length, num_blocks=len(plan.source_blocks)
    )


def _gpu_failure(error: Exception) -> TransferError:
    return TransferError(f"the copy on the GPU failed: {error}", code="internal")


def _open(region: HostRegion, driver: CudaDriver) -> CudaIpcPeer:
    view = region.open()
    if not view.identity.on_device:
        raise Unreachable("its pool is in host memory")
    handle, pointer = NOTE.unpack_from(view.note.data)
    if region.pid == os.getpid():  # a handle cannot be opened where it was made, and need not be
        return CudaIpcPeer(view, pointer)
    try:
        pointer = driver.open(handle)
    except DriverError as error:
        remedy = _REMEDIES.get(error.name, _REMEDY)
        raise Unreachable(f"its GPU memory cannot be opened: {error}", remedy=remedy) from error
    peer = CudaIpcPeer(view, pointer)
    # The transport and every running transfer hold the peer, so this comes after the last copy.
    weakref.finalize(peer, _close, driver, pointer).atexit = False
    return peer


def _close(driver: CudaDriver, pointer: int) -> None:
    try:
        driver.close(pointer)
    except DriverError as error:
        log.debug("a peer's GPU memory was gone before it was closed: %s", error)
