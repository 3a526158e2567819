"""One blocking TCP connection between two transceivers: frames, and raw bytes straight from and into a pool.

Every wait looks at its `Stop` some ten times a second. The kernel's own socket timeouts are used instead of
Python's, so that one system call can move a whole batch of blocks.
"""

import select
import socket
import struct
import time
from collections.abc import Sequence

from diptych.errors import TransferError
from diptych.transceiver import frames
from diptych.transceiver.frames import BadFrame, Hello, Kind, Message, Prove, Refused, Welcome
from diptych.transceiver.stop import Stop

MAX_IOVECS = 512
CONNECT_S = 5.0  # a host that does not answer by then is gone, however long the fetch may take

_SLICE = struct.pack("@ll", 0, 100_000)  # struct timeval: after this long without progress, look at the Stop


class Connection:
    """OSError: the connection is gone. BadFrame: nonsense arrived. TransferError: the Stop says so."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        _tune(sock)
        self._socket = sock

    def send(self, message: Message, stop: Stop) -> None:
        self.send_buffers([memoryview(frames.encode(message))], stop)

    def receive(self, stop: Stop) -> Message:
        prefix = bytearray(frames.LENGTH.size)
        self.fill_buffers([memoryview(prefix)], stop)
        body = bytearray(frames.body_length(bytes(prefix)))
        self.fill_buffers([memoryview(body)], stop)
        return frames.decode(bytes(body))

    def send_buffers(self, buffers: Sequence[memoryview], stop: Stop) -> None:
        pending = list(buffers)
        while pending:
            stop.check()
            try:
                sent = self._socket.sendmsg(pending[:MAX_IOVECS], (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                continue
            pending = _after(pending, sent)

    def fill_buffers(self, buffers: Sequence[memoryview], stop: Stop) -> None:
        pending = list(buffers)
        while pending:
            stop.check()
            try:
                received = self._socket.recvmsg_into(pending[:MAX_IOVECS], 0, socket.MSG_WAITALL)[0]
            except BlockingIOError:
                continue
            if received == 0:
                raise ConnectionResetError("the peer closed the connection")
            pending = _after(pending, received)

    def wait_readable(self, timeout_s: float | None) -> bool:
        """True also when the peer has closed."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))

    def hung_up(self) -> bool:
        """The peer has closed; what it had sent may still be here."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def fileno(self) -> int:
        return self._socket.fileno()

    def shutdown(self) -> None:
        """Ends whatever another thread waits for here."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # gone already

    def close(self) -> None:
        self._socket.close()


def dial(
    address: tuple[str, int], kind: Kind, incarnation: str, secret: bytes | None, stop: Stop
) -> Connection:
    """A connection to that incarnation and no other; TransferError in every other case."""
    host, port = address
    try:
        connection = Connection(_connect(host, port, stop))
    except OSError as error:
        raise TransferError(f"no connection to {host}:{port}: {error}", code="peer_gone") from error
    try:
        _greet(connection, kind, incarnation, secret, stop)
    except (OSError, BadFrame) as error:
        connection.close()
        raise TransferError(f"{host}:{port} did not greet back: {error}", code="peer_gone") from error
    except TransferError:
        connection.close()
        raise
    return connection


def _greet(connection: Connection, kind: Kind, incarnation: str, secret: bytes | None, stop: Stop) -> None:
    nonce = frames.new_nonce()
    connection.send(Hello(frames.PROTOCOL_VERSION, kind, incarnation, nonce), stop)
    answer = connection.receive(stop)
    if isinstance(answer, Refused):
        raise TransferError(answer.message, code=answer.code)
    if not isinstance(answer, Welcome):
        raise BadFrame(f"{type(answer).__name__} instead of Welcome")
    if secret is None:
        if answer.wants_proof:
            raise TransferError("the peer has a cluster secret, this worker has none", code="refused")
        return
    expected = frames.proof_of(secret, "owner", nonce, answer.nonce)
    if not frames.same_proof(answer.proof, expected):
        raise TransferError("the peer does not know this worker's cluster secret", code="refused")
    connection.send(Prove(frames.proof_of(secret, "reader", nonce, answer.nonce)), stop)


def _connect(host: str, port: int, stop: Stop) -> socket.socket:
    # Numeric addresses only: a name lookup has no deadline. Owners publish numbers.
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        sock.connect_ex(address)
        poll = select.poll()
        poll.register(sock, select.POLLOUT)
        given_up_at = time.monotonic() + CONNECT_S
        while not poll.poll(stop.slice_s() * 1000):
            stop.check()
            if time.monotonic() >= given_up_at:
                raise TimeoutError(f"no answer within {CONNECT_S:g} s")
        failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            raise OSError(failure, "connection failed")
    except BaseException:
        sock.close()
        raise
    return sock


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Buffer sizes stay the kernel's: it grows them to tcp_rmem's maximum, while a size set here would end
    # that and be cut to net.core.rmem_max, which is small on most hosts.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SLICE)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _SLICE)
    # A host that vanished says nothing: after some 5 s of silence the kernel calls the connection dead. It answers
    # for a process that is only stopped or busy.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def _after(buffers: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of the buffers after their first `num_bytes`."""
    for i, buffer in enumerate(buffers):
        if num_bytes < len(buffer):
            return [buffer[num_bytes:], *buffers[i + 1 :]]
        num_bytes -= len(buffer)
    return []
