"""Where a pool's bytes are, and memory of the same kind to try things with."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from diptych.transceiver.nixl.agent import Memory
from diptych.transceiver.pool import KvPool
from diptych.transceiver.pool_memory import PoolMemory


def memory_of(pool: KvPool) -> Memory:
    num_bytes = pool.identity.num_blocks * pool.identity.block_bytes
    if isinstance(pool, PoolMemory):
        return Memory(kind="DRAM", address=pool.data.ctypes.data, num_bytes=num_bytes)
    from diptych.transceiver.device_pool import DevicePool

    assert isinstance(pool, DevicePool)
    return Memory(kind="VRAM", address=pool.pointer, num_bytes=num_bytes, device=pool.device.index)


def context_of(pool: KvPool) -> Callable[[], AbstractContextManager[None]]:
    """What a library that looks at the pool's memory needs around its calls: of a GPU, its context."""
    if isinstance(pool, PoolMemory):
        return nullcontext
    from diptych.transceiver.device_pool import DevicePool

    assert isinstance(pool, DevicePool)
    return pool.driver.current


def scratch_like(memory: Memory, num_bytes: int) -> tuple[Memory, Any]:
    """The second is to be kept for as long as the memory is in use."""
    if memory.kind == "DRAM":
        array = np.zeros(num_bytes, np.uint8)
        return Memory(kind="DRAM", address=array.ctypes.data, num_bytes=num_bytes), array
    import torch

    tensor = torch.zeros(num_bytes, dtype=torch.uint8, device=torch.device("cuda", memory.device))
    torch.cuda.synchronize(memory.device)
    return Memory(kind="VRAM", address=tensor.data_ptr(), num_bytes=num_bytes, device=memory.device), tensor
