"""Transport within a host: the reader maps the owner's pool memory and copies; the owner's CPU takes no part.

Needs the same boot of the same host, the same pid namespace and the right to open the owner's descriptor;
what decides is the header of the memory itself. Works while the owner is stopped; after its death as long as
the mapping lives, which `forget` ends.
"""

import time

import numpy as np

from diptych.errors import ConfigError, TransferError
from diptych.transceiver.host_region import HostRegion
from diptych.transceiver.outcome import Outcome
from diptych.transceiver.peers import Peers
from diptych.transceiver.plan import CopyPlan
from diptych.transceiver.pool import Bytes, DigestKind, KvPool
from diptych.transceiver.pool_memory import PoolMemory, PoolView
from diptych.transceiver.stop import Stop
from diptych.transceiver.transport import (
    PROBE_BYTES,
    Landed,
    TransferState,
    TransportContext,
    fastest,
    ignore_landed,
    probe_plan,
)

# Small enough that the digest of a piece still finds it in a core's cache.
PIECE_BYTES = 1 << 20


class ShmPeer:
    def __init__(self, view: PoolView) -> None:
        self.view = view
        self.reason = "same host"


class ShmTransfer(Outcome):
    def __init__(
        self, view: PoolView, destination: Bytes, plan: CopyPlan, stop: Stop, landed: Landed
    ) -> None:
        super().__init__(stop)
        self._view = view
        self._destination = destination
        self._spans = plan.pieces(PIECE_BYTES)
        self._source_blocks = plan.source_blocks
        self._landed = landed

    def wait(self) -> None:
        started = time.monotonic()
        try:
            self._copy()
        except TransferError:
            self._fail()
            raise
        finally:
            self.seconds = time.monotonic() - started
        self.state = TransferState.DONE

    def _copy(self) -> None:
        source, destination, spans = self._view.data, self._destination, self._spans
        for src, dst, length in zip(
            spans.source_offset.tolist(),
            spans.destination_offset.tolist(),
            spans.length.tolist(),
            strict=True,
        ):
            self._stop.check()
            here = destination[dst : dst + length]
            np.copyto(here, source[src : src + length])  # without the GIL
            self._landed(dst, here)
            self.bytes += length
        self.generations = self._view.generations[self._source_blocks]


class ShmTransport:
    name = "shm"

    def __init__(self, context: TransportContext) -> None:
        self._memory: PoolMemory | None = None
        self._peers: Peers[ShmPeer] = Peers()

    def register(self, memory: KvPool) -> bytes:
        if not isinstance(memory, PoolMemory):
            raise ConfigError("KV transport shm copies between pools in host memory, and this pool is not")
        self._memory = memory
        return HostRegion.of(memory).encode()

    def connect(self, descriptor: bytes, stop: Stop) -> ShmPeer:
        region = HostRegion.decode(descriptor)
        return self._peers.add(descriptor, region.identity.incarnation, lambda: ShmPeer(region.open()))

    def start(
        self,
        peer: ShmPeer,
        plan: CopyPlan,
        stop: Stop,
        landed: Landed,
        digest_kind: DigestKind | None,
    ) -> ShmTransfer:
        assert self._memory is not None, "start before register"
        plan.require_within(
            source_blocks=peer.view.identity.num_blocks,
            destination_blocks=self._memory.identity.num_blocks,
        )
        return ShmTransfer(peer.view, self._memory.data, plan, stop, landed)

    def measure(self, peer: ShmPeer, stop: Stop) -> float:
        plan = probe_plan(peer.view.identity, PROBE_BYTES)
        scratch = np.zeros(plan.num_bytes, np.uint8)
        return fastest(lambda: ShmTransfer(peer.view, scratch, plan, stop, ignore_landed))

    def forget(self, incarnation: str) -> None:
        self._peers.forget(incarnation)

    def close(self) -> None:
        self._peers.clear()
