"""A TCP proxy between two of our processes, to break what is between them: silence, cuts, refusals."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable
from typing import Literal

Way = Literal["up", "down"]
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


class TcpProxy:
    """Use as a context manager; threads, so that tests with and without a loop can have it.

    `silence` lets bytes in and nothing out: a partition that closes no connection.
    """

    def __init__(
        self, port: int, host: str = "127.0.0.1", *, listen_host: str = "127.0.0.1", listen_port: int = 0
    ):
        self._upstream = (host, port)
        self._listener = socket.create_server((listen_host, listen_port))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._passing: dict[Way, threading.Event] = {"up": threading.Event(), "down": threading.Event()}
        self._closed = False
        self.refuses = False
        self.cut_after: int | None = None  # bytes towards the client, of one connection
        self.on_cut: Callable[[], object] = lambda: None  # called before `cut_after` cuts
        self.heal()

    def __enter__(self) -> "TcpProxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self.heal()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def silence(self, *ways: Way) -> None:
        """Up is towards the server. None: both."""
        for way in ways or self._passing:
            self._passing[way].clear()

    def heal(self) -> None:
        """What was held back goes on."""
        self.refuses = False
        for passing in self._passing.values():
            passing.set()

    def cut(self) -> None:
        """Reset every open connection."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for sock in sockets:
            _reset(sock)

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.refuses:
                _reset(client)
                continue
            try:
                server = socket.create_connection(self._upstream)
            except OSError:
                _reset(client)
                continue
            with self._lock:
                self._sockets |= {client, server}
            for source, sink, way in ((client, server, "up"), (server, client, "down")):
                threading.Thread(target=self._pump, args=(source, sink, way), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, way: Way) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._passing[way].wait()
                if way == "down" and self.cut_after is not None and passed + len(data) > self.cut_after:
                    sink.sendall(data[: max(0, self.cut_after - passed)])
                    self.on_cut()
                    self.cut()
                    return
                sink.sendall(data)
                passed += len(data)
            sink.shutdown(socket.SHUT_WR)
            return
        self._drop(source, sink)

    def _drop(self, *sockets: socket.socket) -> None:
        with self._lock:
            self._sockets -= set(sockets)
        for sock in sockets:
            _reset(sock)


def _reset(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that reads from it
    sock.close()
