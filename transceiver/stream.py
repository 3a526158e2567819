"""Transports in which the owner takes part: the reader names spans, the owner sends their bytes over a wire.

What a wire is, tcp.py and ucx.py say. Wires are kept and used again, one transfer at a time on each. Needs the
owner's process to run: a stopped owner shows only at the deadline.
"""

import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from diptych.errors import TransferError
from diptych.transceiver.connection import Connection
from diptych.transceiver.frames import MAX_SPANS, BadFrame, Read, Refused, Sending, Sent
from diptych.transceiver.outcome import Outcome
from diptych.transceiver.peers import Peers
from diptych.transceiver.plan import CopyPlan
from diptych.transceiver.pool import DigestKind, Generations, KvPool
from diptych.transceiver.spans import Int64s, batches, cut
from diptych.transceiver.staging import BATCH_BYTES, HostInlet, Inlet, Outlet, inlet_of, outlet_of
from diptych.transceiver.staging import MAX_SPANS as MAX_BATCH_SPANS
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
from diptych.transceiver.wires import StreamPeer, StreamRegion, Wire, Wires, broken


class StreamTransfer(Outcome):
    def __init__(
        self,
        peer: StreamPeer,
        wire: Wire,
        inlet: Inlet,
        plan: CopyPlan,
        stop: Stop,
        landed: Landed,
        digest_kind: DigestKind | None,
        settled: Callable[[Inlet], None],
    ) -> None:
        super().__init__(stop)
        self._peer = peer
        self._wire = wire
        self._inlet = inlet
        self._plan = plan
        self._spans = plan.pieces(BATCH_BYTES)
        self._landed = ignore_landed if inlet.digests(plan, digest_kind) else landed
        self._digest_kind = digest_kind
        self._settled = settled  # takes the inlet back

    def wait(self) -> None:
        started = time.monotonic()
        try:
            parts = [self._request(spans, blocks) for spans, blocks in self._requests()]
            self.generations = np.concatenate(parts)
            self.digests = self._inlet.finish(self._plan, self._digest_kind)
            self.state = TransferState.DONE
        except (OSError, BadFrame) as error:
            raise broken(self._peer.region, error) from error
        finally:
            self._inlet.settle()
            self._settled(self._inlet)
            self.seconds = time.monotonic() - started
            self._release()

    def _release(self) -> None:
        if self.state is TransferState.DONE:
            self._peer.give_back(self._wire)
            return
        self._fail()
        self._wire.close()

    def _requests(self) -> Iterator[tuple[slice, slice]]:
        """Bounded requests: the generation numbers are asked for with the last spans, never before."""
        num_spans, num_blocks = len(self._spans.length), len(self._plan.source_blocks)
        last = max(0, (num_spans - 1) // MAX_SPANS) * MAX_SPANS
        for start in range(0, last, MAX_SPANS):
            yield slice(start, start + MAX_SPANS), slice(0, 0)
        yield slice(last, num_spans), slice(0, MAX_SPANS)
        for start in range(MAX_SPANS, num_blocks, MAX_SPANS):
            yield slice(num_spans, num_spans), slice(start, start + MAX_SPANS)

    def _request(self, spans: slice, blocks: slice) -> Generations:
        wire, wanted, stop = self._wire, self._spans, self._stop
        pairs = np.stack([wanted.source_offset[spans], wanted.length[spans]], axis=1)
        source_blocks = self._plan.source_blocks[blocks]
        wire.send(Read(pairs.tobytes(), source_blocks.tobytes()), stop)
        answer = wire.receive(stop)
        if isinstance(answer, Refused):
            raise TransferError(answer.message, code=answer.code)
        if not isinstance(answer, Sending) or answer.num_bytes != int(wanted.length[spans].sum()):
            raise BadFrame("the answer to Read is not what was asked for")
        self._receive(wanted.destination_offset[spans], wanted.length[spans])
        trailer = wire.receive(stop)
        if not isinstance(trailer, Sent) or len(trailer.generations) != 8 * len(source_blocks):
            raise BadFrame("the trailer of a Read is not what was asked for")
        return np.frombuffer(trailer.generations, np.uint64)

    def _receive(self, offsets: Int64s, lengths: Int64s) -> None:
        for batch in batches(lengths, BATCH_BYTES, MAX_BATCH_SPANS):
            arrays = self._inlet.take(offsets[batch], lengths[batch])
            self._wire.fill_buffers([array.data for array in arrays], self._stop)
            for offset, array in zip(offsets[batch].tolist(), arrays, strict=True):
                self._landed(offset, array)
                self.bytes += len(array)
            self._inlet.put()


class StreamTransport:
    def __init__(self, name: str, wires: Wires, context: TransportContext) -> None:
        self.name = name
        self._wires = wires
        self._context = context
        self._memory: KvPool | None = None
        self._peers: Peers[StreamPeer] = Peers()
        self._lock = threading.Lock()
        self._idle: list[Inlet] = []  # not in use: those of a GPU are dear

    def register(self, memory: KvPool) -> bytes:
        self._memory = memory
        server = self._context.server
        sender = _Sender(memory, self._wires, self._context.send_timeout_s)
        server.handle(self._wires.kind, sender.serve)
        host, port = server.address
        return msgspec.msgpack.encode(StreamRegion(identity=memory.identity, host=host, port=port))

    def connect(self, descriptor: bytes, stop: Stop) -> StreamPeer:
        region = StreamRegion.decode(descriptor)
        known = self._peers.find(descriptor)
        if known is not None:
            return known
        peer = StreamPeer(region, self._wires, self._context.secret)
        peer.give_back(peer.borrow(stop))  # the proof
        known = self._peers.add(descriptor, region.identity.incarnation, lambda: peer)
        if known is not peer:
            peer.close()
        return known

    def start(
        self, peer: StreamPeer, plan: CopyPlan, stop: Stop, landed: Landed, digest_kind: DigestKind | None
    ) -> StreamTransfer:
        assert self._memory is not None, "start before register"
        plan.require_within(
            source_blocks=peer.region.identity.num_blocks,
            destination_blocks=self._memory.identity.num_blocks,
        )
        wire = peer.borrow(stop)
        inlet = self._borrow_inlet(self._memory)
        return StreamTransfer(peer, wire, inlet, plan, stop, landed, digest_kind, self._idle.append)

    def measure(self, peer: StreamPeer, stop: Stop) -> float:
        plan = probe_plan(peer.region.identity, PROBE_BYTES)
        inlet = HostInlet(np.zeros(plan.num_bytes, np.uint8))
        return fastest(
            lambda: StreamTransfer(peer, peer.borrow(stop), inlet, plan, stop, ignore_landed, None, _drop)
        )

    def forget(self, incarnation: str) -> None:
        for peer in self._peers.forget(incarnation):
            peer.close()

    def close(self) -> None:
        for peer in self._peers.clear():
            peer.close()
        self._idle.clear()

    def _borrow_inlet(self, memory: KvPool) -> Inlet:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return inlet_of(memory)


def _drop(inlet: Inlet) -> None:
    """Nobody needs it again."""


class _Sender:
    """The owner's side of wires."""

    def __init__(self, memory: KvPool, wires: Wires, send_timeout_s: float) -> None:
        self._memory = memory
        self._wires = wires
        self._num_bytes = memory.identity.num_blocks * memory.identity.block_bytes
        self._generations = memory.generations
        self._send_timeout_s = send_timeout_s

    def serve(self, connection: Connection, number: int) -> None:
        outlet = outlet_of(self._memory)
        wire = self._wires.owner(connection, Stop(self._send_timeout_s))
        try:
            while True:
                wire.wait_readable(None)
                message = wire.receive(Stop(self._send_timeout_s))
                if not isinstance(message, Read):
                    raise BadFrame(f"{type(message).__name__} on a data connection")
                self._answer(wire, outlet, message)
        finally:
            wire.close()

    def _answer(self, wire: Wire, outlet: Outlet, read: Read) -> None:
        offset, length, blocks = self._parse(read)
        wire.send(Sending(int(length.sum())), Stop(self._send_timeout_s))
        index, inside, piece = cut(length, BATCH_BYTES)
        for arrays in outlet.batches(offset[index] + inside, piece):
            wire.send_buffers([array.data for array in arrays], Stop(self._send_timeout_s))
        # Only now: a block that was reused while its bytes left must show.
        wire.send(Sent(self._generations[blocks].tobytes()), Stop(self._send_timeout_s))

    def _parse(self, read: Read) -> tuple[Int64s, Int64s, Int64s]:
        if len(read.spans) % 16 or len(read.blocks) % 8:
            raise BadFrame(f"Read of {len(read.spans)} and {len(read.blocks)} bytes")
        spans = np.frombuffer(read.spans, np.int64).reshape(-1, 2)
        blocks = np.frombuffer(read.blocks, np.int64)
        offset, length = spans[:, 0], spans[:, 1]
        size = self._num_bytes
        if not bool(np.all((offset >= 0) & (length > 0) & (length <= size) & (offset <= size - length))):
            raise BadFrame(f"Read of spans outside the pool of {size} bytes")
        if not bool(np.all((blocks >= 0) & (blocks < len(self._generations)))):
            raise BadFrame(f"Read of generation numbers outside the pool of {len(self._generations)} blocks")
        return offset, length, blocks
