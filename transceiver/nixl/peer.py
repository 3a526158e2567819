"""A reader's side of one owner: its agent made known to ours, and the proof that it can be read without its help."""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from diptych.transceiver.frames import MAX_SPANS, Alone, Attach, Attached, BadFrame, Read, Reading, Sent
from diptych.transceiver.nixl.agent import AgentCard, Memory, RunningRead
from diptych.transceiver.nixl.shared import Shared
from diptych.transceiver.pool import Generations
from diptych.transceiver.spans import Int64s
from diptych.transceiver.stop import Stop
from diptych.transceiver.transport import Unreachable
from diptych.transceiver.wires import StreamPeer, Wire, broken

if TYPE_CHECKING:
    from diptych.transceiver.nixl.reader import NixlReader

POLL_S = 20e-6
_ACQUAINTANCE_S = 5.0
_ALONE_S = 0.3  # within which an owner that does nothing must have been read
_TRIALS = 3
_REMEDY = (
    "let UCX use RDMA between the hosts or, within one, let processes read each other's memory (the same user, "
    "pid namespace and ptrace rights); else leave nixl out"
)


class NixlPeer:
    """One owner's agent, known to the reader's."""

    reason = "its memory can be read without its help"

    def __init__(self, reader: "NixlReader", card: AgentCard, wires: StreamPeer) -> None:
        self.card = card
        self.wires = wires
        self.region = wires.region
        self.reader = reader
        self._shared = Shared(self._close)
        self._proving = threading.Lock()
        self._proven = False
        self._refusal: Unreachable | None = None
        reader.agent.add(card)

    @property
    def forgotten(self) -> bool:
        return self._shared.retired

    @contextmanager
    def use(self) -> Iterator[None]:
        """The reader's agent lives and knows it for as long as this lasts."""
        with self.reader.shared.use(), self._shared.use():
            yield

    def forget(self) -> None:
        """As soon as nobody uses it."""
        self._shared.retire()

    def _close(self) -> None:
        with contextlib.suppress(ConnectionError):  # the agent is gone
            self.reader.agent.remove(self.card)
        self.wires.close()

    def prove(self, proof: Memory, stop: Stop) -> None:
        """Once: make acquaintance with the owner's help, then read without it. Into `proof`, which stays."""
        with self._proving:
            if self._refusal is not None:
                raise self._refusal
            if self._proven:
                return
            with self.use(), borrowed(self.wires, stop) as wire:
                self._prove(wire, proof, stop)
            self._proven = True

    def _prove(self, wire: Wire, proof: Memory, stop: Stop) -> None:
        read = self._read(proof)
        for _ in range(_TRIALS):  # acquaintance can need help after a first read has succeeded
            wire.send(Reading(), stop)
            if not _done_within(_ACQUAINTANCE_S, read, stop):
                raise self._refuse("nixl does not reach it, though its port answers")
            wire.send(Alone(), stop)
            if not isinstance(wire.receive(stop), Attached):
                raise BadFrame("the answer to Alone is not what was asked for")
            read = self._read(proof)
            if _done_within(_ALONE_S, read, stop):
                ask_generations(wire, np.empty(0, np.int64), stop)  # it may help others again
                return
        wire.send(Reading(), stop)
        _done_within(_ACQUAINTANCE_S, read, stop)  # a reader that left now would bring the owner down
        raise self._refuse("nixl cannot read its memory without its help")

    def _read(self, proof: Memory) -> RunningRead:
        start = np.zeros(1, np.int64)
        length = np.array([min(proof.num_bytes, self.region.identity.block_bytes)])
        return self.reader.agent.read(self.card, start, proof, start, length)

    def _refuse(self, reason: str) -> Unreachable:
        self._refusal = Unreachable(reason, remedy=_REMEDY)
        return self._refusal


def _done_within(seconds: float, read: RunningRead, stop: Stop) -> bool:
    limit = time.monotonic() + seconds
    while not read.is_done():
        stop.check()
        if time.monotonic() > limit:
            return False
        time.sleep(POLL_S)
    read.release()
    return True


@contextmanager
def borrowed(wires: StreamPeer, stop: Stop) -> Iterator[Wire]:
    """A wire that answers: the owner is alive, and the one that it was. Kept unless something fails."""
    wire = wires.borrow(stop)
    try:
        yield wire
    except (OSError, BadFrame, msgspec.MsgspecError) as error:
        wire.close()
        raise broken(wires.region, error) from error
    except BaseException:
        wire.close()
        raise
    wires.give_back(wire)


def ask_card(wires: StreamPeer, stop: Stop) -> AgentCard:
    with borrowed(wires, stop) as wire:
        wire.send(Attach(b""), stop)
        answer = wire.receive(stop)
        if not isinstance(answer, Attached):
            raise BadFrame("the answer to Attach is not what was asked for")
        return msgspec.msgpack.decode(answer.data, type=AgentCard)


def ask_generations(wire: Wire, blocks: Int64s, stop: Stop) -> Generations:
    parts = [np.empty(0, np.uint64)]
    for start in range(0, max(1, len(blocks)), MAX_SPANS):
        wanted = blocks[start : start + MAX_SPANS]
        wire.send(Read(b"", wanted.tobytes()), stop)
        answer = wire.receive(stop)
        if not isinstance(answer, Sent) or len(answer.generations) != 8 * len(wanted):
            raise BadFrame("the answer to Read is not what was asked for")
        parts.append(np.frombuffer(answer.generations, np.uint64))
    return np.concatenate(parts)
