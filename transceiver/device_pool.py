"""The memory of one rank's KV pool on a GPU.

The blocks are one allocation of the driver, exported once for other processes of the host; the header and the
generation numbers are a small memfd, so that a peer checks them as it does those of a pool in host memory.
"""

import logging
import os
import struct
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diptych.errors import StartupError
from diptych.kernels.block_digest import digest_blocks
from diptych.kv_layout import KvLayout
from diptych.transceiver.cuda_driver import HANDLE_BYTES, CudaDriver, DriverError
from diptych.transceiver.pool import DigestKind
from diptych.transceiver.pool_memory import PoolFile, PoolIdentity, PoolView

log = logging.getLogger(__name__)

NOTE = struct.Struct(f"<{HANDLE_BYTES}sQ")  # handle for other processes, address in the owner's


class DevicePool(PoolView):
    """`tensor` is `[num_blocks, block_bytes]` uint8. The memory goes when the last tensor over it is gone."""

    digest_kind: DigestKind = "nh_64"

    def __init__(self, file: PoolFile, identity: PoolIdentity, driver: CudaDriver, tensor: Tensor) -> None:
        super().__init__(file.mapping, identity)
        self.fd = file.fd
        self.driver = driver
        self.device = tensor.device
        self.tensor = tensor
        self.pointer: int = tensor.data_ptr()
        # In the pool file, not in tickets: only the owner itself can say where its memory is.
        NOTE.pack_into(self.note.data, 0, driver.export(self.pointer), self.pointer)
        self._stream = torch.cuda.Stream(tensor.device)
        self._lock = threading.Lock()
        self._open = True

    @classmethod
    def create(
        cls, layout: KvLayout, num_blocks: int, incarnation: str, device: torch.device
    ) -> "DevicePool":
        identity = PoolIdentity.of(layout, num_blocks, incarnation, on_device=True)
        if layout.block_bytes % 16:
            raise StartupError(f"a KV block has {layout.block_bytes} bytes, a GPU needs a multiple of 16")
        file = PoolFile.create(identity)
        try:
            driver = CudaDriver(device)
            tensor = _allocate(driver, num_blocks * layout.block_bytes, device)
            return cls(file, identity, driver, tensor.view(num_blocks, layout.block_bytes))
        except DriverError as error:
            os.close(file.fd)
            size = num_blocks * layout.block_bytes / 2**30
            raise StartupError(
                f"a KV pool of {num_blocks} blocks needs {size:.2f} GiB on the GPU: {error}"
            ) from error

    def digest(self, block_ids: Sequence[int]) -> list[int]:
        # On a stream of its own: what these blocks hold was complete before they were named here.
        with self._lock, torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            ids = torch.tensor(list(block_ids), dtype=torch.int64).pin_memory()
            found = digest_blocks(self.tensor, ids.to(self.device, non_blocking=True))
            digests: list[int] = found.cpu().numpy().view(np.uint64).tolist()
            return digests

    def close(self) -> None:
        if not self._open:
            return
        os.close(self.fd)
        self._open = False
        self.tensor = torch.empty(0, self.identity.block_bytes, dtype=torch.uint8)
        self.data, self.note, self.generations = (
            np.empty(0, np.uint8),
            np.empty(0, np.uint8),
            np.empty(0, np.uint64),
        )
        self.blocks = self.data.reshape(0, self.identity.block_bytes)


class _Allocation:
    """What torch keeps alive for as long as a tensor is over it."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


def _allocate(driver: CudaDriver, num_bytes: int, device: torch.device) -> Tensor:
    pointer = driver.allocate(num_bytes)
    allocation = _Allocation(pointer, num_bytes)
    # Not at exit: the driver is gone by then, and the memory with it.
    weakref.finalize(allocation, _free, driver, pointer).atexit = False
    return torch.as_tensor(allocation, device=device)


def _free(driver: CudaDriver, pointer: int) -> None:
    try:
        driver.free(pointer)
    except DriverError as error:
        log.warning("the memory of a KV pool could not be freed: %s", error)
