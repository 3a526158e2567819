"""Transport over UCX, by the ucxx package: frames on our own connection, raw bytes as UCX messages beside it.

UCX chooses what they travel over. It never sees a pool: the owner gathers spans into buffers of its wire and the
reader scatters them from its own (pools on GPUs go through staging.py as ever), so nothing can write to a pool
for a transfer that was given up, and thousands of small spans are few messages. Every wire has a UCX worker of
its own, which makes progress only while somebody waits for it: an idle wire takes no CPU, and there is no
thread. ucxx offers no reads of a peer's memory, which would need less of it.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from diptych.transceiver.connection import Connection
from diptych.transceiver.frames import Attach, Attached, BadFrame, Kind, Message, Sending, Sent
from diptych.transceiver.packages import load_package
from diptych.transceiver.pool import Bytes
from diptych.transceiver.stop import Stop
from diptych.transceiver.stream import StreamTransport
from diptych.transceiver.transport import TransportContext

_MESSAGE_BYTES = 4 << 20
_WINDOW = 2  # messages: one is filled or emptied while another one travels
_OPTIONS = {"RNDV_THRESH": "8192"}  # the environment's is for nixl


class UcxTransport(StreamTransport):
    def __init__(self, context: TransportContext) -> None:
        super().__init__("ucx", _UcxWires(), context)


class _UcxWires:
    kind: Kind = "ucx"

    def __init__(self) -> None:
        self._library: Any = load_package("ucx", "_lib.libucxx")
        self._array: Any = load_package("ucx", "_lib.arr").Array
        self._lock = threading.Lock()

    def reader(self, connection: Connection, stop: Stop) -> "_UcxWire":
        channel = self._channel(connection)
        connection.send(Attach(channel.address), stop)
        if not isinstance(connection.receive(stop), Attached):
            raise BadFrame("the answer to Attach is not what was asked for")
        return _UcxWire(connection, channel)

    def owner(self, connection: Connection, stop: Stop) -> "_UcxWire":
        attach = connection.receive(stop)
        if not isinstance(attach, Attach):
            raise BadFrame(f"{type(attach).__name__} on a ucx connection")
        channel = self._channel(connection)
        channel.aim(attach.data)
        connection.send(Attached(b""), stop)
        return _UcxWire(connection, channel)

    def _channel(self, connection: Connection) -> "_Channel":
        with self._lock:
            return _Channel(self._library, self._array, connection)


class _UcxWire:
    """Raw bytes of one Read are messages of equal size but for the last, whatever the buffers' sizes."""

    def __init__(self, connection: Connection, channel: "_Channel") -> None:
        self._connection = connection
        self._channel = channel
        self._filled = 0  # owner: bytes of the message that is being made
        self._unasked = 0  # reader: bytes of this Read that no message was asked for yet
        self._message: Bytes = np.empty(0, np.uint8)  # reader: what is left of the one that came last

    def send(self, message: Message, stop: Stop) -> None:
        if isinstance(message, Sent):
            if self._filled:
                self._send_message()
            self._channel.flush(stop)
        self._connection.send(message, stop)

    def receive(self, stop: Stop) -> Message:
        message = self._connection.receive(stop)
        if isinstance(message, Sending):
            self._unasked = message.num_bytes
            for _ in range(_WINDOW):
                self._ask()
        return message

    def send_buffers(self, buffers: Sequence[memoryview], stop: Stop) -> None:
        for buffer in buffers:
            source = np.frombuffer(buffer, np.uint8)
            while len(source):
                if not self._filled:
                    self._message = self._channel.free_buffer(stop)
                count = min(len(source), _MESSAGE_BYTES - self._filled)
                self._message[self._filled : self._filled + count] = source[:count]
                self._filled, source = self._filled + count, source[count:]
                if self._filled == _MESSAGE_BYTES:
                    self._send_message()

    def fill_buffers(self, buffers: Sequence[memoryview], stop: Stop) -> None:
        for buffer in buffers:
            destination = np.frombuffer(buffer, np.uint8)
            while len(destination):
                if not len(self._message):
                    self._message = self._channel.arrived(stop)
                count = min(len(destination), len(self._message))
                destination[:count] = self._message[:count]
                destination, self._message = destination[count:], self._message[count:]
                if not len(self._message):
                    self._ask()

    def wait_readable(self, timeout_s: float | None) -> bool:
        return self._connection.wait_readable(timeout_s)

    def close(self) -> None:
        self._channel.close()
        self._connection.close()

    def _send_message(self) -> None:
        self._channel.send(self._filled)
        self._filled = 0

    def _ask(self) -> None:
        if self._unasked:
            count = min(self._unasked, _MESSAGE_BYTES)
            self._channel.ask(count)
            self._unasked -= count


class _Channel:
    """Numbered messages from an owner to a reader, in buffers that take turns.

    Its UCX context is its own as well: ucxx makes contexts that threads must not share.
    """

    def __init__(self, library: Any, array: Any, connection: Connection) -> None:
        self._library = library
        self._array = array
        self._connection = connection
        with self._errors():
            context = library.UCXContext(
                config_dict=_OPTIONS, feature_flags=(library.Feature.TAG, library.Feature.WAKEUP)
            )
            self._worker = library.UCXWorker(
                context, enable_delayed_submission=False, enable_python_future=False
            )
            self._worker.init_blocking_progress_mode()
        self.address: bytes = self._worker.address.tobytes()
        self._endpoint: Any = None
        self._buffers = [np.empty(_MESSAGE_BYTES, np.uint8) for _ in range(_WINDOW)]
        self._under_way: dict[int, tuple[Any, int]] = {}  # buffer -> request, bytes
        self._started = 0  # messages
        self._taken = 0

    def aim(self, address: bytes) -> None:
        """At the reader: from now on it can be sent to."""
        with self._errors():
            there = self._library.UCXAddress.create_from_buffer(address)
            self._endpoint = self._library.UCXEndpoint.create_from_worker_address(
                self._worker, there, endpoint_error_handling=True
            )

    def free_buffer(self, stop: Stop) -> Bytes:
        """For the next message, when what was in it has left."""
        self._finish(self._started % _WINDOW, stop)
        return self._buffers[self._started % _WINDOW]

    def send(self, num_bytes: int) -> None:
        """What `free_buffer` gave, its first bytes."""
        self._start(self._endpoint.tag_send, num_bytes)

    def flush(self, stop: Stop) -> None:
        for buffer in list(self._under_way):
            self._finish(buffer, stop)

    def ask(self, num_bytes: int) -> None:
        """For the next message, into the buffer whose message was taken longest ago."""
        self._start(self._worker.tag_recv, num_bytes)

    def arrived(self, stop: Stop) -> Bytes:
        """The oldest message that was asked for and not taken."""
        buffer = self._taken % _WINDOW
        self._taken += 1
        return self._buffers[buffer][: self._finish(buffer, stop)]

    def close(self) -> None:
        if self._worker is not None:
            with contextlib.suppress(ConnectionError), self._errors():
                self._worker.cancel_inflight_requests()
        # In this order: what is under way goes before its worker, and the buffers after both.
        self._under_way.clear()
        self._endpoint = self._worker = None

    def _start(self, operation: Callable[[Any, Any], Any], num_bytes: int) -> None:
        buffer = self._started % _WINDOW
        assert buffer not in self._under_way
        with self._errors():
            request = operation(
                self._array(self._buffers[buffer][:num_bytes]), self._library.UCXXTag(self._started)
            )
        self._under_way[buffer] = (request, num_bytes)
        self._started += 1

    def _finish(self, buffer: int, stop: Stop) -> int:
        request, num_bytes = self._under_way.get(buffer, (None, 0))
        if request is None:
            return 0
        with self._errors():
            while not request.completed:
                stop.check()
                if self._connection.hung_up():
                    raise ConnectionResetError("the peer closed the connection")
                self._worker.progress_worker_event(int(stop.slice_s() * 1000))
            request.check_error()
        del self._under_way[buffer]
        return num_bytes

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._library.UCXError as error:
            raise ConnectionError(f"UCX says {type(error).__name__}: {error}") from error
