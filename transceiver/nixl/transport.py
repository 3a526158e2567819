"""Transport by the nixl package: the reader's library reads the owner's pool, over RDMA or within a host.

The owner's process takes part only in making acquaintance, and says at the end which generations its blocks
have. That it need not take part is proven first: where nixl has nothing but TCP it emulates reads with the help
of the owner's process, which a reader that leaves in the middle can then bring down (seen with nixl 1.5.1), and
which is no faster than tcp.py. So a read always ends by itself, and a transfer that is given up waits for that.
"""

import contextlib
import secrets
import threading

import msgspec

from diptych.errors import StartupError, TransferError
from diptych.transceiver.nixl.agent import NixlAgent
from diptych.transceiver.nixl.memory import context_of, memory_of, scratch_like
from diptych.transceiver.nixl.owner import NixlOwner
from diptych.transceiver.nixl.peer import NixlPeer, ask_card
from diptych.transceiver.nixl.reader import NixlReader
from diptych.transceiver.nixl.transfer import NixlTransfer
from diptych.transceiver.plan import CopyPlan
from diptych.transceiver.pool import DigestKind, KvPool
from diptych.transceiver.stop import Stop
from diptych.transceiver.transport import (
    PROBE_BYTES,
    Landed,
    TransportContext,
    Unreachable,
    fastest,
    probe_plan,
)
from diptych.transceiver.wires import Connections, StreamPeer, StreamRegion


class NixlTransport:
    name = "nixl"

    def __init__(self, context: TransportContext) -> None:
        self._context = context
        self._memory: KvPool | None = None
        self._lock = threading.Lock()

    def register(self, memory: KvPool) -> bytes:
        identity, server = memory.identity, self._context.server
        self._memory = memory
        self._agent = NixlAgent(f"{identity.incarnation}-{secrets.token_hex(4)}", context_of(memory))
        pool = memory_of(memory)
        try:
            self._agent.register(pool)
            card = self._agent.card(pool)
        except TransferError as error:
            raise StartupError(f"KV transport nixl cannot register the KV pool: {error}") from error
        self._reader = NixlReader(memory)
        owner = NixlOwner(self._agent, card, memory, self._context.send_timeout_s)
        server.handle("nixl", owner.serve)
        host, port = server.address
        return msgspec.msgpack.encode(StreamRegion(identity=identity, host=host, port=port))

    def connect(self, descriptor: bytes, stop: Stop) -> NixlPeer:
        assert self._memory is not None, "connect before register"
        region = StreamRegion.decode(descriptor)
        if region.identity.on_device != self._memory.identity.on_device:
            raise Unreachable("one of the pools is on a GPU, the other is not")
        reader = self._living_reader(self._memory)
        peer = reader.peers.find(descriptor)
        if peer is None:
            peer = self._meet(reader, descriptor, region, stop)
        peer.prove(reader.proof, stop)
        return peer

    def start(
        self, peer: NixlPeer, plan: CopyPlan, stop: Stop, landed: Landed, digest_kind: DigestKind | None
    ) -> NixlTransfer:
        assert self._memory is not None, "start before register"
        plan.require_within(
            source_blocks=peer.region.identity.num_blocks,
            destination_blocks=self._memory.identity.num_blocks,
        )
        return NixlTransfer(peer, peer.reader.here, plan, stop, self._memory, landed, digest_kind)

    def measure(self, peer: NixlPeer, stop: Stop) -> float:
        reader = peer.reader
        size = PROBE_BYTES if reader.here.kind == "DRAM" else 8 * PROBE_BYTES
        plan = probe_plan(peer.region.identity, size)
        scratch, keep = scratch_like(reader.here, plan.num_bytes)
        registered = reader.agent.register(scratch)
        try:
            return fastest(lambda: NixlTransfer(peer, scratch, plan, stop))
        finally:
            with contextlib.suppress(ConnectionError):  # the agent is gone, and what it knew
                reader.agent.deregister(registered)
            del keep

    def forget(self, incarnation: str) -> None:
        for peer in self._reader.peers.forget(incarnation):
            peer.forget()

    def close(self) -> None:
        if self._memory is not None:
            self._reader.retire()
            self._agent.close()

    def _living_reader(self, memory: KvPool) -> NixlReader:
        with self._lock:
            if self._reader.shared.retired:
                self._reader = NixlReader(memory)
            return self._reader

    def _meet(self, reader: NixlReader, descriptor: bytes, region: StreamRegion, stop: Stop) -> NixlPeer:
        wires = StreamPeer(region, Connections("nixl"), self._context.secret)
        card = ask_card(wires, stop)
        peer = reader.peers.add(
            descriptor,
            region.identity.incarnation,
            lambda: NixlPeer(reader, card, wires),
        )
        if peer.wires is not wires:  # somebody else was faster
            wires.close()
        return peer
