"""What the link between two processes does at best: one plain copy of contiguous bytes, timed as transfers are."""

import socket
import time
from collections.abc import Callable

import numpy as np

from diptych.errors import StartupError
from diptych.transceiver.bench.owner import REQUEST
from diptych.transceiver.host_region import HostRegion
from diptych.transceiver.pool import KvPool
from diptych.transceiver.pool_memory import PoolMemory

_POLL_S = 20e-6
_TIMEOUT_S = 60.0

# A copy of so many bytes; the seconds that it took.
PlainCopy = Callable[[int], float]


class PlainSocket:
    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S)
        self._socket.settimeout(None)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._scratch = np.zeros(64 << 20, np.uint8)

    def __call__(self, num_bytes: int) -> float:
        started = time.perf_counter()
        self._socket.sendall(REQUEST.pack(num_bytes))
        left = num_bytes
        while left:
            received = self._socket.recv_into(
                self._scratch[: min(left, len(self._scratch))].data, 0, socket.MSG_WAITALL
            )
            if not received:
                raise StartupError("the owner's process of kv-bench has ended; its error is above")
            left -= received
        return time.perf_counter() - started

    def close(self) -> None:
        self._socket.close()


def memcpy(region: HostRegion, memory: PoolMemory) -> PlainCopy:
    view = region.open()

    def copy(num_bytes: int) -> float:
        started = time.perf_counter()
        np.copyto(memory.data[:num_bytes], view.data[:num_bytes])
        return time.perf_counter() - started

    return copy


def peer_copy(region: HostRegion, memory: KvPool) -> PlainCopy:
    """cudaMemcpy from the owner's GPU, by the copy engines."""
    import torch

    from diptych.transceiver.device_pool import NOTE, DevicePool

    assert isinstance(memory, DevicePool)
    view = region.open()
    handle, _ = NOTE.unpack_from(view.note.data)
    source, stream = memory.driver.open(handle), torch.cuda.Stream(memory.device)

    def copy(num_bytes: int) -> float:
        done = torch.cuda.Event()
        started = time.perf_counter()
        with memory.driver.current():
            memory.driver.copy(memory.pointer, source, num_bytes, stream.cuda_stream)
        done.record(stream)
        while not done.query():
            time.sleep(_POLL_S)
        return time.perf_counter() - started

    return copy
