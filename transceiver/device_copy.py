"""Runs the block copy kernel: numbers up, kernel, digests down, on streams of its own, from any thread.

One kernel runs at a time; the next one's numbers and the last one's digests travel meanwhile. The small buffers that
a copy needs are kept and used again. Knows nothing of peers, tickets or deadlines.
"""

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diptych.kernels.block_copy import CopyGrid
from diptych.transceiver.cuda_driver import CudaDriver
from diptych.transceiver.pool import Digests

_FIRST_SIZE = 1 << 14  # numbers; 2k blocks fit


class CopySlot:
    """What one copy at a time needs: digests, then the kernel's numbers, here and on the GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.stream = torch.cuda.Stream(device)
        self.copied = torch.cuda.Event()  # the kernel
        self.host = torch.empty(size, dtype=torch.int64, pin_memory=True)
        self.numbers = self.host.numpy()
        self.on_device = torch.empty(size, dtype=torch.int64, device=device)
        self.here: int = self.host.data_ptr()
        self.there: int = self.on_device.data_ptr()
        self.done = torch.cuda.Event()  # and its digests are here
        self.num_blocks = 0


class DeviceCopier:
    """At most `num_programs` of the GPU's multiprocessors copy at a time."""

    def __init__(self, driver: CudaDriver, device: torch.device, num_programs: int) -> None:
        from diptych.kernels.block_copy_triton import BlockMover

        self._driver = driver
        self._device = device
        self._num_programs = num_programs
        self._mover = BlockMover()
        self._stream = torch.cuda.Stream(device)
        self._lock = threading.Lock()
        self._idle: list[CopySlot] = []
        self._num_running = 0
        self._last: torch.cuda.Event | None = None  # the kernel that was queued last

    def start(self, source: int, destination: int, grid: CopyGrid, *, digest: bool) -> CopySlot:
        """From the address `source` to the address `destination`. Wait for `done`, then `finish`."""
        start = grid.num_blocks + 1  # the digests, and a number of the kernel's own
        start += start % 2  # what follows is aligned as the kernel expects it
        end = start + grid.num_numbers
        slot = self._borrow(end)
        slot.num_blocks = grid.num_blocks
        slot.numbers[:start] = 0
        grid.pack_into(slot.numbers[start:end])
        with self._lock, self._driver.current():
            self._driver.upload(slot.there, slot.here, 8 * end, slot.stream.cuda_stream)
            if self._num_running and self._last is not None:
                slot.stream.wait_event(self._last)
            self._num_running += 1
            self._mover.copy(
                source,
                destination,
                slot.there + 8 * start,
                slot.there,
                grid,
                num_programs=self._num_programs,
                digest=digest,
                stream=slot.stream,
            )
            slot.copied.record(slot.stream)
            self._last = slot.copied
            if digest:
                self._driver.download(slot.here, slot.there, 8 * start, slot.stream.cuda_stream)
            slot.done.record(slot.stream)
        return slot

    def scratch(self, num_bytes: int) -> Tensor:
        """Memory for a copy that nobody wants."""
        with self._allocating():
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def finish(self, slot: CopySlot) -> Digests:
        """The digests of the source blocks; zeros when they were not asked for. The slot is free again."""
        digests = slot.numbers[: slot.num_blocks].view(np.uint64).copy()
        with self._lock:
            self._num_running -= 1
            self._idle.append(slot)
        return digests

    def _borrow(self, size: int) -> CopySlot:
        with self._lock:
            fitting = next((slot for slot in self._idle if slot.size >= size), None)
            if fitting is not None:
                self._idle.remove(fitting)
                return fitting
        with self._allocating():
            return CopySlot(max(_FIRST_SIZE, 1 << (size - 1).bit_length()), self._device)

    @contextlib.contextmanager
    def _allocating(self) -> Iterator[None]:
        """On our stream: what the model's stream has freed, its kernels may still be writing to."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield
