"""What carries frames and raw bytes between a reader and an owner, and the wires to one owner that are not in use."""

import threading
from collections.abc import Sequence
from typing import Protocol

import msgspec

from diptych.errors import TransferError
from diptych.transceiver.connection import Connection, dial
from diptych.transceiver.frames import BadFrame, Kind, Message
from diptych.transceiver.pool_memory import PoolIdentity
from diptych.transceiver.stop import Stop

MAX_IDLE_WIRES = 4  # kept for each peer


class Wire(Protocol):
    """Frames, and between a Sending and a Sent frame that many raw bytes. Errors are those of a Connection."""

    def send(self, message: Message, stop: Stop) -> None: ...

    def receive(self, stop: Stop) -> Message: ...

    def send_buffers(self, buffers: Sequence[memoryview], stop: Stop) -> None: ...

    def fill_buffers(self, buffers: Sequence[memoryview], stop: Stop) -> None: ...

    def wait_readable(self, timeout_s: float | None) -> bool: ...

    def close(self) -> None: ...


class Wires(Protocol):
    """How both ends of a wire are made of a greeted connection."""

    kind: Kind  # of the connection

    def reader(self, connection: Connection, stop: Stop) -> Wire: ...

    def owner(self, connection: Connection, stop: Stop) -> Wire: ...


class Connections:
    """The simplest wires: connections as they are."""

    def __init__(self, kind: Kind) -> None:
        self.kind: Kind = kind

    def reader(self, connection: Connection, stop: Stop) -> Wire:
        return connection

    def owner(self, connection: Connection, stop: Stop) -> Wire:
        return connection


class StreamRegion(msgspec.Struct, frozen=True, kw_only=True):
    identity: PoolIdentity
    host: str
    port: int

    @classmethod
    def decode(cls, descriptor: bytes) -> "StreamRegion":
        try:
            return msgspec.msgpack.decode(descriptor, type=cls)
        except msgspec.MsgspecError as error:
            raise TransferError(f"the owner's region cannot be read: {error}", code="layout") from error


class StreamPeer:
    """The wires to one owner that are not in use."""

    def __init__(self, region: StreamRegion, wires: Wires, secret: bytes | None) -> None:
        self.region = region
        self.reason = f"{region.host}:{region.port} answers"
        self._wires = wires
        self._secret = secret
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._closed = False

    def borrow(self, stop: Stop) -> Wire:
        while True:
            with self._lock:
                wire = self._idle.pop() if self._idle else None
            if wire is None:
                return self._open(stop)
            if not wire.wait_readable(0):  # an idle wire has nothing to say but that it is closed
                return wire
            wire.close()

    def give_back(self, wire: Wire) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < MAX_IDLE_WIRES:
                self._idle.append(wire)
                return
        wire.close()

    def _open(self, stop: Stop) -> Wire:
        region = self.region
        connection = dial(
            (region.host, region.port), self._wires.kind, region.identity.incarnation, self._secret, stop
        )
        try:
            return self._wires.reader(connection, stop)
        except (OSError, BadFrame) as error:
            connection.close()
            raise broken(region, error) from error
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for wire in idle:
            wire.close()


def broken(region: StreamRegion, error: Exception) -> TransferError:
    return TransferError(
        f"the data connection to {region.host}:{region.port} broke: {error}", code="peer_gone"
    )
