"""The owner's side of nixl connections: who its agent is, help while readers make acquaintance, generations."""

import threading
import time

import msgspec
import numpy as np

from diptych.transceiver.connection import Connection
from diptych.transceiver.frames import Alone, Attach, Attached, BadFrame, Read, Reading, Sent
from diptych.transceiver.nixl.agent import AgentCard, NixlAgent
from diptych.transceiver.pool import KvPool
from diptych.transceiver.stop import Stop

_HELP_EVERY_S = 1e-4
_ALONE_S = 2.0  # at most: others may need help


class NixlOwner:
    def __init__(self, agent: NixlAgent, card: AgentCard, memory: KvPool, timeout_s: float) -> None:
        self._agent = agent
        self._card = msgspec.msgpack.encode(card)
        self._generations = memory.generations
        self._timeout_s = timeout_s
        self._helping = threading.Lock()

    def serve(self, connection: Connection, number: int) -> None:
        while True:
            connection.wait_readable(None)
            stop = Stop(self._timeout_s)
            message = connection.receive(stop)
            if isinstance(message, Attach):
                connection.send(Attached(self._card), stop)
            elif isinstance(message, Reading):
                self._help(connection)
            elif isinstance(message, Alone):
                with self._helping:
                    connection.send(Attached(b""), stop)
                    connection.wait_readable(_ALONE_S)
            elif isinstance(message, Read):
                connection.send(Sent(self._generations_of(message).tobytes()), stop)
            else:
                raise BadFrame(f"{type(message).__name__} on a nixl connection")

    def _help(self, connection: Connection) -> None:
        """Until the reader says something, or goes: the kernel tells, also of a host that vanished."""
        while not connection.wait_readable(0):
            with self._helping:
                self._agent.progress()
            time.sleep(_HELP_EVERY_S)

    def _generations_of(self, read: Read) -> np.ndarray:
        if read.spans or len(read.blocks) % 8:
            raise BadFrame(f"Read of {len(read.spans)} and {len(read.blocks)} bytes on a nixl connection")
        blocks = np.frombuffer(read.blocks, np.int64)
        if not bool(np.all((blocks >= 0) & (blocks < len(self._generations)))):
            raise BadFrame(f"Read of generation numbers outside the pool of {len(self._generations)} blocks")
        found: np.ndarray = self._generations[blocks]
        return found
