"""One copy by nixl: reads of a bounded size, a few at a time, and then the owner's word on its generations.

A read cannot be recalled. One that has not ended by the deadline lingers; what ends it at last is the end of our agent.
"""

import contextlib
import time
from collections import deque
from contextlib import ExitStack

import numpy as np

from diptych.errors import TransferError
from diptych.transceiver.frames import Reading
from diptych.transceiver.nixl.agent import Memory, RunningRead
from diptych.transceiver.nixl.peer import POLL_S, NixlPeer, ask_generations, borrowed
from diptych.transceiver.outcome import Outcome
from diptych.transceiver.plan import CopyPlan
from diptych.transceiver.pool import DigestKind, Digests, KvPool
from diptych.transceiver.pool_memory import PoolMemory
from diptych.transceiver.spans import Spans, batches
from diptych.transceiver.stop import Stop
from diptych.transceiver.timer import sharpen_timer
from diptych.transceiver.transport import Landed, TransferState, ignore_landed

# Of one read: for a CPU so little that its digest finds the bytes in a cache, for a GPU as much as keeps it busy.
_READ_BYTES = {"DRAM": 8 << 20, "VRAM": 256 << 20}
_READ_SPANS = 4096
_WINDOW = 2  # reads at a time
_SETTLE_EVERY_S = 0.01


class NixlTransfer(Outcome):
    def __init__(
        self,
        peer: NixlPeer,
        here: Memory,
        plan: CopyPlan,
        stop: Stop,
        pool: KvPool | None = None,
        landed: Landed = ignore_landed,
        digest_kind: DigestKind | None = None,
    ) -> None:
        """`pool`: what `here` belongs to, when anybody wants to know what landed."""
        super().__init__(stop)
        self._peer = peer
        self._here = here
        self._plan = plan
        self._pool = pool
        self._landed = landed
        self._digest_kind = digest_kind
        self._running: deque[tuple[RunningRead, Spans]] = deque()
        self._held: ExitStack | None = None  # peer and wire of reads that go on after `wait`

    @property
    def lingers(self) -> bool:
        return self._held is not None

    def wait(self) -> None:
        started = time.monotonic()
        sharpen_timer()
        try:
            with ExitStack() as held:
                held.enter_context(self._peer.use())
                wire = held.enter_context(borrowed(self._peer.wires, self._stop))
                wire.send(Reading(), self._stop)  # nixl goes on making acquaintance during the first reads
                try:
                    self._copy()
                except BaseException:
                    # They end by themselves, unless an owner that is frozen is still needed for that.
                    if not self._let_go(self._stop.remaining_s()):
                        self._held = held.pop_all()
                    raise
                self.generations = ask_generations(wire, self._plan.source_blocks, self._stop)
            self.digests = self._digest()
            self.state = TransferState.DONE
        finally:
            self.seconds = time.monotonic() - started
            if self.state is not TransferState.DONE:
                self._fail()

    def _copy(self) -> None:
        size = _READ_BYTES[self._here.kind]
        spans = self._plan.pieces(size)
        for part in batches(spans.length, size, _READ_SPANS):
            self._stop.check()
            cut = Spans(spans.source_offset[part], spans.destination_offset[part], spans.length[part])
            self._running.append((self._start(cut), cut))
            if len(self._running) == _WINDOW:
                self._finish()
        while self._running:
            self._finish()

    def _start(self, spans: Spans) -> RunningRead:
        return self._peer.reader.agent.read(
            self._peer.card, spans.source_offset, self._here, spans.destination_offset, spans.length
        )

    def _finish(self) -> None:
        """The oldest read."""
        read, spans = self._running[0]
        while not read.is_done():
            self._stop.check()
            time.sleep(POLL_S)
        self._running.popleft()
        read.release()
        self._land(spans)

    def _land(self, spans: Spans) -> None:
        self.bytes += spans.num_bytes
        if isinstance(self._pool, PoolMemory):
            for start, length in zip(spans.destination_offset.tolist(), spans.length.tolist(), strict=True):
                self._landed(start, self._pool.data[start : start + length])

    def settle(self, patience_s: float) -> None:
        held, self._held = self._held, None
        if held is None:
            return
        until = time.monotonic() + patience_s
        with contextlib.suppress(TransferError), held:
            while not (over := self._let_go(0.0)) and not self._peer.forgotten and time.monotonic() < until:
                time.sleep(_SETTLE_EVERY_S)
            if not over:
                self._give_up()
            raise TransferError("it was given up", code="deadline")  # the wire is of no more use
        if not over:
            self._peer.reader.shared.closed.wait()  # others use our agent no longer than their own deadlines

    def _give_up(self) -> None:
        for read, _ in self._running:
            read.release()
        self._running.clear()
        self._peer.reader.retire()

    def _let_go(self, seconds: float) -> bool:
        """Whether nothing is read any more, within that time."""
        limit = time.monotonic() + seconds
        while self._running:
            read, _ = self._running[0]
            try:
                over = read.is_done()
            except TransferError:
                over = True
            if over:
                self._running.popleft()
                read.release()
            elif time.monotonic() >= limit:
                return False
            else:
                time.sleep(POLL_S)
        return True

    def _digest(self) -> Digests | None:
        pool, plan = self._pool, self._plan
        if self._digest_kind is None or pool is None or isinstance(pool, PoolMemory) or not plan.whole_blocks:
            return None
        assert pool.digest_kind == self._digest_kind  # of two pools on GPUs
        return np.array(pool.digest(plan.destination_blocks.tolist()), np.uint64)
