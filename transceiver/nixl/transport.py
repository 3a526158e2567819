"""Transport by the nixl package: the reader's library reads the owner's pool, over RDMA or within a host.

The owner's process takes part only in making acquaintance, and says at the end which generations its blocks
have. That it need not take part is proven first: where nixl has nothing but TCP it emulates reads with the help
of the owner's process, which a reader that leaves in the middle can then bring down (seen with nixl 1.5.1), and
which is no faster than tcp.py. So a read always ends by itself, and a transfer that is given up waits for that.
"""

import secrets

import msgspec

from diptych.errors import StartupError, TransferError
from diptych.transceiver.nixl.agent import NixlAgent
from diptych.transceiver.nixl.memory import context_of, memory_of, scratch_like
from diptych.transceiver.nixl.owner import NixlOwner
from diptych.transceiver.nixl.peer import NixlPeer, ask_card
from diptych.transceiver.nixl.transfer import NixlTransfer
from diptych.transceiver.peers import Peers
from diptych.transceiver.plan import CopyPlan
from diptych.transceiver.pool import DigestKind, KvPool
from diptych.transceiver.stop import Stop
from diptych.transceiver.transport import (
    PROBE_BYTES,
    Landed,
    TransportContext,
    Unreachable,
    probe_plan,
)
from diptych.transceiver.wires import Connections, StreamPeer, StreamRegion

_PROOF_BYTES = 64 << 10


class NixlTransport:
    name = "nixl"

    def __init__(self, context: TransportContext) -> None:
        self._context = context
        self._memory: KvPool | None = None
        self._peers: Peers[NixlPeer] = Peers()

    def register(self, memory: KvPool) -> bytes:
        identity, server = memory.identity, self._context.server
        self._memory = memory
        self._here = memory_of(memory)
        # Several agents of one process have names of their own, also in processes of the same incarnation.
        self._agent = NixlAgent(f"{identity.incarnation}-{secrets.token_hex(4)}", context_of(memory))
        self._proof, self._keep = scratch_like(self._here, _PROOF_BYTES)
        try:
            self._agent.register(self._here)
            card = self._agent.card(self._here)
            self._agent.register(self._proof)
        except TransferError as error:
            raise StartupError(f"KV transport nixl cannot register the KV pool: {error}") from error
        owner = NixlOwner(self._agent, card, memory, self._context.send_timeout_s)
        server.handle("nixl", owner.serve)
        host, port = server.address
        return msgspec.msgpack.encode(StreamRegion(identity=identity, host=host, port=port))

    def connect(self, descriptor: bytes, stop: Stop) -> NixlPeer:
        assert self._memory is not None, "connect before register"
        region = StreamRegion.decode(descriptor)
        if region.identity.on_device != self._memory.identity.on_device:
            raise Unreachable("one of the pools is on a GPU, the other is not")
        peer = self._peers.find(descriptor)
        if peer is None:
            peer = self._meet(descriptor, region, stop)
        peer.prove(self._proof, stop)
        return peer

    def start(
        self, peer: NixlPeer, plan: CopyPlan, stop: Stop, landed: Landed, digest_kind: DigestKind | None
    ) -> NixlTransfer:
        assert self._memory is not None, "start before register"
        plan.require_within(
            source_blocks=peer.region.identity.num_blocks,
            destination_blocks=self._memory.identity.num_blocks,
        )
        return NixlTransfer(peer, self._agent, self._here, plan, stop, self._memory, landed, digest_kind)

    def measure(self, peer: NixlPeer, stop: Stop) -> float:
        size = PROBE_BYTES if self._here.kind == "DRAM" else 8 * PROBE_BYTES
        plan = probe_plan(peer.region.identity, size)
        scratch, keep = scratch_like(self._here, plan.num_bytes)
        registered = self._agent.register(scratch)
        best = 0.0
        try:
            for _ in range(3):  # the first one pays for page tables
                transfer = NixlTransfer(peer, self._agent, scratch, plan, stop)
                transfer.wait()
                best = max(best, transfer.bytes / transfer.seconds / 1e9)
        finally:
            self._agent.deregister(registered)
            del keep
        return best

    def forget(self, incarnation: str) -> None:
        for peer in self._peers.forget(incarnation):
            peer.close()

    def close(self) -> None:
        for peer in self._peers.clear():
            peer.close()
        if self._memory is not None:
            self._agent.close()

    def _meet(self, descriptor: bytes, region: StreamRegion, stop: Stop) -> NixlPeer:
        wires = StreamPeer(region, Connections("nixl"), self._context.secret)
        card = ask_card(wires, stop)
        peer = self._peers.add(
            descriptor, region.identity.incarnation, lambda: NixlPeer(self._agent, card, wires)
        )
        if peer.wires is not wires:  # somebody else was faster
            wires.close()
        return peer
