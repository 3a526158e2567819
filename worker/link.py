"""Messages between a worker's HTTP process and its engine process: msgpack over a pair of ZeroMQ sockets."""

import os
import threading
from collections.abc import Iterator

import msgspec
import zmq

from diptych.wire import FromEngine, ToEngine

_TO_ENGINE = msgspec.msgpack.Decoder(ToEngine)
_FROM_ENGINE = msgspec.msgpack.Decoder(FromEngine)
_ENCODER = msgspec.msgpack.Encoder()


def encode(message: ToEngine | FromEngine) -> bytes:
    return _ENCODER.encode(message)


def decode_from_engine(data: bytes) -> FromEngine:
    message: FromEngine = _FROM_ENGINE.decode(data)
    return message


class EngineLink:
    """The engine's end. Only the step loop's thread uses it, except for `wake` and `end_with`."""

    def __init__(self, endpoint: str) -> None:
        self._lock = threading.Lock()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.connect(endpoint)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake_fd, zmq.POLLIN)

    def receive(self, timeout_s: float) -> Iterator[ToEngine]:
        """The messages that are there, after waiting at most `timeout_s` for the first or for `wake`."""
        ready = dict(self._poller.poll(round(timeout_s * 1000)))
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        if self._socket not in ready:
            return
        while True:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            message: ToEngine = _TO_ENGINE.decode(data)
            yield message

    def send(self, message: FromEngine) -> None:
        with self._lock:
            self._socket.send(encode(message))

    def end_with(self, message: FromEngine) -> None:
        """The last message, from any thread, while the step loop does not run; returns when it is delivered."""
        with self._lock:
            self._socket.send(encode(message))
            self._socket.close()
            self._context.term()

    def wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        os.close(self._wake_fd)
