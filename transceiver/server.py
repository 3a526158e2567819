"""The owner's listening port: greets peers, checks who they are, and hands each connection to its handler.

One thread a connection, since copies block. Knows the greeting but neither leases nor pools: the transceiver
brings the handler for control connections, the tcp transport the one for data. A peer that misbehaves loses
its connection and gets a log line; nothing else notices.
"""

import contextlib
import ipaddress
import itertools
import logging
import select
import socket
import threading
from collections.abc import Callable

from diptych.errors import StartupError, TransferError
from diptych.transceiver import frames
from diptych.transceiver.connection import Connection
from diptych.transceiver.frames import BadFrame, Hello, Kind, Prove, Refused, Welcome
from diptych.transceiver.stop import Stop

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
GREETING_S = 10.0
TICK_S = 0.5

# Called with a greeted connection and its number; returns when the connection is of no more use.
Handler = Callable[[Connection, int], None]


class Server:
    def __init__(
        self,
        *,
        incarnation: str,
        bind_host: str = "127.0.0.1",
        port: int = 0,
        advertise_host: str | None = None,
        secret: bytes | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._incarnation = incarnation
        self._secret = secret
        self._tick = tick
        self._handlers: dict[Kind, Handler] = {}
        self._listener = _listen(bind_host, port)
        self.address = (_advertised(bind_host, advertise_host), int(self._listener.getsockname()[1]))
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._connections: dict[int, tuple[Connection, threading.Thread]] = {}
        self._numbers = itertools.count(1)
        self._acceptor = threading.Thread(target=self._accept_all, name="kv-accept", daemon=True)

    def handle(self, kind: Kind, handler: Handler) -> None:
        self._handlers[kind] = handler

    def start(self) -> None:
        self._acceptor.start()

    def close(self) -> None:
        self._closing.set()
        with self._lock:
            open_now = list(self._connections.values())
        for connection, _ in open_now:
            connection.shutdown()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends the acceptor's wait
        if self._acceptor.is_alive():
            self._acceptor.join(timeout=TICK_S + 1)
        self._listener.close()
        for _, thread in open_now:
            thread.join(timeout=1)
        self._handlers.clear()  # they hold the pool's memory

    def _accept_all(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while not self._closing.is_set():
            try:
                self._tick()
                if poll.poll(TICK_S * 1000):
                    self._open(self._listener.accept()[0])
            except (
                OSError,
                RuntimeError,
            ) as error:  # no descriptor or thread left, or the peer is gone again
                if not self._closing.is_set():
                    log.warning("KV transport could not take a connection: %s", error)
                    self._closing.wait(0.1)
            except Exception:
                log.exception("KV transport goes on after an error of ours")
                self._closing.wait(0.1)

    def _open(self, sock: socket.socket) -> None:
        number = next(self._numbers)
        with contextlib.ExitStack() as undo, self._lock:
            undo.callback(sock.close)
            if self._closing.is_set() or len(self._connections) >= MAX_CONNECTIONS:
                log.warning("KV transport turned a connection away: %d are open", len(self._connections))
                return
            connection = Connection(sock)
            thread = threading.Thread(
                target=self._serve, args=(connection, number), name=f"kv-serve-{number}", daemon=True
            )
            thread.start()  # it waits for the lock before it removes its entry
            self._connections[number] = (connection, thread)
            undo.pop_all()

    def _serve(self, connection: Connection, number: int) -> None:
        try:
            self._handlers[self._greet(connection)](connection, number)
        except BadFrame as error:
            log.warning("KV connection %d closed, the peer does not speak our protocol: %s", number, error)
        except TransferError as error:
            log.warning("KV connection %d closed: %s", number, error)
        except OSError as error:
            log.debug("KV connection %d ended: %s", number, error)
        except Exception:
            log.exception("KV connection %d closed by an error of ours", number)
        finally:
            with self._lock:
                del self._connections[number]
            connection.close()

    def _greet(self, connection: Connection) -> Kind:
        stop = Stop(GREETING_S)
        hello = connection.receive(stop)
        if not isinstance(hello, Hello):
            raise BadFrame(f"{type(hello).__name__} instead of Hello")
        refusal = self._refusal(hello)
        if refusal is not None:
            connection.send(refusal, stop)
            raise TransferError(refusal.message, code=refusal.code)
        nonce = frames.new_nonce()
        if self._secret is None:
            connection.send(Welcome(nonce, b"", wants_proof=False), stop)
            return hello.kind
        proof = frames.proof_of(self._secret, "owner", hello.nonce, nonce)
        connection.send(Welcome(nonce, proof, wants_proof=True), stop)
        answer = connection.receive(stop)
        expected = frames.proof_of(self._secret, "reader", hello.nonce, nonce)
        if not isinstance(answer, Prove) or not frames.same_proof(answer.proof, expected):
            raise TransferError("the reader does not know the cluster secret", code="refused")
        return hello.kind

    def _refusal(self, hello: Hello) -> Refused | None:
        if hello.version != frames.PROTOCOL_VERSION:
            return Refused(
                "layout",
                f"protocol version {hello.version} was offered, this worker speaks {frames.PROTOCOL_VERSION}",
            )
        if hello.incarnation != self._incarnation:
            return Refused(
                "peer_gone", f"incarnation {hello.incarnation} is gone, this is {self._incarnation}"
            )
        if hello.kind not in self._handlers:
            return Refused("refused", f"this worker serves no {hello.kind} connections")
        return None


def _listen(bind_host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in bind_host else socket.AF_INET
    try:
        return socket.create_server((bind_host, port), family=family, backlog=128)
    except OSError as error:
        raise StartupError(f"KV transport cannot listen on {bind_host}:{port}: {error}") from error


def _advertised(bind_host: str, advertise_host: str | None) -> str:
    """The numeric address that readers dial: names are looked up here, once, not in every fetch."""
    host = advertise_host or bind_host
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
        raise StartupError(f"KV transport's advertised host {host!r} has no address: {error}") from error
    address = str(found)
    return _outbound_address() if ipaddress.ip_address(address).is_unspecified else address


def _outbound_address() -> str:
    """This host's own address on its default route (no packet is sent), or the loopback without a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return "127.0.0.1"
