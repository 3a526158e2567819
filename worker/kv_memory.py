"""The KV pool of an engine: where its blocks are, how many there are, and what can move them.

A pool is on the device that computes. What is said of the memory that is free is true when it is asked: after
the model was loaded.
"""

import os
from typing import TYPE_CHECKING

from diptych.errors import StartupError
from diptych.kv_layout import KvLayout
from diptych.transceiver.pool import KvPool
from diptych.worker.settings import EngineSettings

if TYPE_CHECKING:
    from torch import Tensor, device

_DEFAULT_CPU_POOL_BYTES = 512 << 20
# What takes the place of a transport between pools in host memory when the pool is on a GPU.
_ON_GPU = {"shm": "cuda_ipc"}


def num_blocks(settings: EngineSettings, layout: KvLayout, *, reserved_bytes: int = 0) -> int:
    """`reserved_bytes` of the free memory are for the steps."""
    available = max(0, _available_bytes(settings.device) - reserved_bytes)
    if settings.max_kv_tokens is not None:
        wanted = -(-settings.max_kv_tokens // layout.tokens_per_block)
    else:
        budget = int(available * settings.kv_memory_fraction)
        if settings.device == "cpu":
            budget = min(_DEFAULT_CPU_POOL_BYTES, budget)
        wanted = budget // layout.block_bytes
    if wanted < 1 or wanted * layout.block_bytes > available:
        raise StartupError(
            f"{wanted} KV blocks of {layout.block_bytes >> 10} KiB do not fit the {available >> 20} MiB of free "
            "memory: set kv_cache_config.max_tokens to a value that does"
        )
    return wanted


def create_pool(settings: EngineSettings, layout: KvLayout, count: int) -> "tuple[KvPool, Tensor]":
    """The pool, and the same memory as the model sees it (cache.py)."""
    from diptych.worker.cache import pool_tensor

    if settings.device == "cpu":
        import torch

        from diptych.transceiver.pool_memory import PoolMemory

        memory = PoolMemory.create(layout, count, settings.incarnation)
        return memory, pool_tensor(torch.from_numpy(memory.data), layout)

    from diptych.transceiver.device_pool import DevicePool

    pool = DevicePool.create(layout, count, settings.incarnation, device_of(settings))
    return pool, pool_tensor(pool.tensor, layout)


def usable_transports(settings: EngineSettings) -> tuple[str, ...]:
    """The settings' transports, for a pool on the settings' device."""
    if settings.device == "cpu":
        return settings.transports
    return tuple(_ON_GPU.get(name, name) for name in settings.transports)


def device_of(settings: EngineSettings) -> "device":
    """Each rank has one of the GPUs that the process may see, in their order."""
    import torch

    return torch.device("cpu") if settings.device == "cpu" else torch.device("cuda", settings.dims.tp_rank)


def require_device(settings: EngineSettings) -> "device":
    """The rank's device, before a model is loaded onto it. StartupError when it is not there."""
    import torch

    found = device_of(settings)
    if found.type == "cpu":
        return found
    if not torch.cuda.is_available():
        raise StartupError(
            f"device is {settings.device}, but torch {torch.__version__} cannot use a GPU here: install a torch built "
            "for CUDA and check CUDA_VISIBLE_DEVICES, or set device to cpu"
        )
    if torch.cuda.device_count() < settings.dims.tp_size:
        raise StartupError(
            f"tensor_parallel_size is {settings.dims.tp_size}, and this process sees {torch.cuda.device_count()} "
            "GPUs: lower it, or let CUDA_VISIBLE_DEVICES name more of them"
        )
    torch.cuda.set_device(found)
    return found


def device_bytes_in_use(device: str) -> int:
    """Of the GPU, by all processes; 0 without one."""
    if device == "cpu":
        return 0
    import torch

    free, total = torch.cuda.mem_get_info()
    return int(total - free)


def _available_bytes(device: str) -> int:
    if device == "cpu":
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    import torch

    torch.cuda.empty_cache()  # what loading the weights left behind
    free, _ = torch.cuda.mem_get_info()
    return int(free)
