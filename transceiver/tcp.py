"""Transport over TCP: the reader names spans, the owner sends them straight from its pool (or, from a GPU,
through staging.py).

Works wherever the owner's port can be reached. Data connections are kept and used again, one transfer at a
time on each. Needs the owner's process to run: a stopped owner shows only at the deadline.
"""

import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from diptych.errors import TransferError
from diptych.transceiver.connection import Connection, dial
from diptych.transceiver.frames import MAX_SPANS, BadFrame, Read, Refused, Sending, Sent
from diptych.transceiver.plan import CopyPlan
from diptych.transceiver.pool import DigestKind, Digests, Generations, KvPool
from diptych.transceiver.pool_memory import PoolIdentity
from diptych.transceiver.spans import Int64s, batches, cut
from diptych.transceiver.staging import BATCH_BYTES, HostInlet, Inlet, Outlet, inlet_of, outlet_of
from diptych.transceiver.staging import MAX_SPANS as MAX_BATCH_SPANS
from diptych.transceiver.stop import Stop
from diptych.transceiver.transport import (
    PROBE_BYTES,
    Landed,
    TransferState,
    TransportContext,
    ignore_landed,
    probe_plan,
)

MAX_IDLE_CONNECTIONS = 4  # kept for each peer


class TcpRegion(msgspec.Struct, frozen=True, kw_only=True):
    identity: PoolIdentity
    host: str
    port: int


class TcpPeer:
    """The connections to one owner that are not in use."""

    def __init__(self, region: TcpRegion, secret: bytes | None) -> None:
        self.region = region
        self.reason = f"{region.host}:{region.port} answers"
        self._secret = secret
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._closed = False

    def borrow(self, stop: Stop) -> Connection:
        while True:
            with self._lock:
                connection = self._idle.pop() if self._idle else None
            if connection is None:
                address = (self.region.host, self.region.port)
                return dial(address, "data", self.region.identity.incarnation, self._secret, stop)
            if not connection.wait_readable(0):  # an idle connection has nothing to say but that it is closed
                return connection
            connection.close()

    def give_back(self, connection: Connection) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < MAX_IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


class TcpTransfer:
    def __init__(
        self,
        peer: TcpPeer,
        connection: Connection,
        inlet: Inlet,
        plan: CopyPlan,
        stop: Stop,
        landed: Landed,
        digest_kind: DigestKind | None,
        settled: Callable[[Inlet], None],
    ) -> None:
        self._peer = peer
        self._connection = connection
        self._inlet = inlet
        self._plan = plan
        self._spans = plan.pieces(BATCH_BYTES)
        self._stop = stop
        self._landed = ignore_landed if inlet.digests(plan, digest_kind) else landed
        self._digest_kind = digest_kind
        self._settled = settled  # takes the inlet back
        self.state = TransferState.RUNNING
        self.bytes = 0
        self.seconds = 0.0
        self.generations: Generations = np.empty(0, np.uint64)
        self.digests: Digests | None = None

    def wait(self) -> None:
        started = time.monotonic()
        try:
            parts = [self._request(spans, blocks) for spans, blocks in self._requests()]
            self.generations = np.concatenate(parts)
            self.digests = self._inlet.finish(self._plan, self._digest_kind)
            self.state = TransferState.DONE
        except (OSError, BadFrame) as error:
            region = self._peer.region
            raise TransferError(
                f"the data connection to {region.host}:{region.port} broke: {error}", code="peer_gone"
            ) from error
        finally:
            self._inlet.settle()
            self._settled(self._inlet)
            self.seconds = time.monotonic() - started
            self._release()

    def abort(self) -> None:
        self._stop.abort()

    def _release(self) -> None:
        if self.state is TransferState.DONE:
            self._peer.give_back(self._connection)
            return
        self.state = TransferState.ABORTED if self._stop.aborted else TransferState.FAILED
        self._connection.close()

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
        connection, wanted, stop = self._connection, self._spans, self._stop
        pairs = np.stack([wanted.source_offset[spans], wanted.length[spans]], axis=1)
        source_blocks = self._plan.source_blocks[blocks]
        connection.send(Read(pairs.tobytes(), source_blocks.tobytes()), stop)
        answer = connection.receive(stop)
        if isinstance(answer, Refused):
            raise TransferError(answer.message, code=answer.code)
        if not isinstance(answer, Sending) or answer.num_bytes != int(wanted.length[spans].sum()):
            raise BadFrame("the answer to Read is not what was asked for")
        self._receive(wanted.destination_offset[spans], wanted.length[spans])
        trailer = connection.receive(stop)
        if not isinstance(trailer, Sent) or len(trailer.generations) != 8 * len(source_blocks):
            raise BadFrame("the trailer of a Read is not what was asked for")
        return np.frombuffer(trailer.generations, np.uint64)

    def _receive(self, offsets: Int64s, lengths: Int64s) -> None:
        for batch in batches(lengths, BATCH_BYTES, MAX_BATCH_SPANS):
            arrays = self._inlet.take(offsets[batch], lengths[batch])
            self._connection.fill_buffers([array.data for array in arrays], self._stop)
            for offset, array in zip(offsets[batch].tolist(), arrays, strict=True):
                self._landed(offset, array)
                self.bytes += len(array)
            self._inlet.put()


class TcpTransport:
    name = "tcp"

    def __init__(self, context: TransportContext) -> None:
        self._context = context
        self._memory: KvPool | None = None
        self._lock = threading.Lock()
        self._peers: dict[bytes, TcpPeer] = {}  # by descriptor
        self._idle: list[Inlet] = []  # not in use: those of a GPU are dear

    def register(self, memory: KvPool) -> bytes:
        self._memory = memory
        server = self._context.server
        sender = _Sender(memory, self._context.send_timeout_s)
        server.handle("data", sender.serve)
        host, port = server.address
        return msgspec.msgpack.encode(TcpRegion(identity=memory.identity, host=host, port=port))

    def connect(self, descriptor: bytes, stop: Stop) -> TcpPeer:
        try:
            region = msgspec.msgpack.decode(descriptor, type=TcpRegion)
        except msgspec.MsgspecError as error:
            raise TransferError(f"tcp region cannot be read: {error}", code="layout") from error
        with self._lock:
            peer = self._peers.get(descriptor)
        if peer is not None:
            return peer
        peer = TcpPeer(region, self._context.secret)
        peer.give_back(peer.borrow(stop))  # the proof
        with self._lock:
            known = self._peers.setdefault(descriptor, peer)
        if known is not peer:
            peer.close()
        return known

    def start(
        self, peer: TcpPeer, plan: CopyPlan, stop: Stop, landed: Landed, digest_kind: DigestKind | None
    ) -> TcpTransfer:
        assert self._memory is not None, "start before register"
        plan.require_within(
            source_blocks=peer.region.identity.num_blocks,
            destination_blocks=self._memory.identity.num_blocks,
        )
        connection = peer.borrow(stop)
        inlet = self._borrow_inlet(self._memory)
        return TcpTransfer(peer, connection, inlet, plan, stop, landed, digest_kind, self._idle.append)

    def measure(self, peer: TcpPeer, stop: Stop) -> float:
        plan = probe_plan(peer.region.identity, PROBE_BYTES)
        inlet = HostInlet(np.zeros(plan.num_bytes, np.uint8))
        transfer = TcpTransfer(peer, peer.borrow(stop), inlet, plan, stop, ignore_landed, None, _drop)
        transfer.wait()
        return transfer.bytes / transfer.seconds / 1e9

    def forget(self, incarnation: str) -> None:
        with self._lock:
            gone = [d for d, peer in self._peers.items() if peer.region.identity.incarnation == incarnation]
            peers = [self._peers.pop(descriptor) for descriptor in gone]
        for peer in peers:
            peer.close()

    def close(self) -> None:
        with self._lock:
            peers, self._peers = list(self._peers.values()), {}
        for peer in peers:
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
    """The owner's side of data connections."""

    def __init__(self, memory: KvPool, send_timeout_s: float) -> None:
        self._memory = memory
        self._num_bytes = memory.identity.num_blocks * memory.identity.block_bytes
        self._generations = memory.generations
        self._send_timeout_s = send_timeout_s

    def serve(self, connection: Connection, number: int) -> None:
        outlet = outlet_of(self._memory)
        while True:
            connection.wait_readable(None)
            message = connection.receive(Stop(self._send_timeout_s))
            if not isinstance(message, Read):
                raise BadFrame(f"{type(message).__name__} on a data connection")
            self._answer(connection, outlet, message)

    def _answer(self, connection: Connection, outlet: Outlet, read: Read) -> None:
        offset, length, blocks = self._parse(read)
        connection.send(Sending(int(length.sum())), Stop(self._send_timeout_s))
        index, inside, piece = cut(length, BATCH_BYTES)
        for arrays in outlet.batches(offset[index] + inside, piece):
            connection.send_buffers([array.data for array in arrays], Stop(self._send_timeout_s))
        # Only now: a block that was reused while its bytes left must show.
        connection.send(Sent(self._generations[blocks].tobytes()), Stop(self._send_timeout_s))

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
