"""Runs the block copy kernel: numbers up, kernel, digests down, on one stream of its own, from any thread.

The small buffers that a copy needs are kept and used again. Knows nothing of peers, tickets or deadlines.
"""

import threading

import numpy as np
import torch
from torch import Tensor

from diptych.kernels.block_copy import CopyGrid
from diptych.transceiver.pool import Digests

_FIRST_SIZE = 1 << 14  # numbers; 2k blocks fit


class CopySlot:
    """What one copy at a time needs: digests, then the kernel's numbers, here and on the GPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.host = torch.empty(size, dtype=torch.int64, pin_memory=True)
        self.numbers = self.host.numpy()
        self.on_device = torch.empty(size, dtype=torch.int64, device=device)
        self.done = torch.cuda.Event()
        self.num_blocks = 0


class DeviceCopier:
    """At most `num_programs` of the GPU's multiprocessors copy at a time."""

    def __init__(self, device: torch.device, num_programs: int) -> None:
        self._device = device
        self._num_programs = num_programs
        self._stream = torch.cuda.Stream(device)
        self._lock = threading.Lock()
        self._idle: list[CopySlot] = []

    def start(self, source: int, destination: Tensor, grid: CopyGrid, *, digest: bool) -> CopySlot:
        """From the address `source` to flat uint8 memory of this GPU. Wait for `done`, then `finish`."""
        from diptych.kernels.block_copy_triton import Address, launch_copy

        start = grid.num_blocks + grid.num_blocks % 2  # numbers are aligned as the kernel expects them
        end = start + grid.num_numbers
        slot = self._borrow(end)
        slot.num_blocks = grid.num_blocks
        slot.numbers[:start] = 0
        grid.pack_into(slot.numbers[start:end])
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            slot.on_device[:end].copy_(slot.host[:end], non_blocking=True)
            launch_copy(
                Address(source),
                destination,
                grid,
                slot.on_device[start:end],
                slot.on_device[: grid.num_blocks],
                num_programs=self._num_programs,
                digest=digest,
            )
            if digest:
                slot.host[:start].copy_(slot.on_device[:start], non_blocking=True)
            slot.done.record(self._stream)
        return slot

    def finish(self, slot: CopySlot) -> Digests:
        """The digests of the source blocks; zeros when they were not asked for. The slot is free again."""
        digests = slot.numbers[: slot.num_blocks].view(np.uint64).copy()
        with self._lock:
            self._idle.append(slot)
        return digests

    def _borrow(self, size: int) -> CopySlot:
        with self._lock:
            fitting = next((slot for slot in self._idle if slot.size >= size), None)
            if fitting is not None:
                self._idle.remove(fitting)
                return fitting
        return CopySlot(max(_FIRST_SIZE, 1 << (size - 1).bit_length()), self._device)
