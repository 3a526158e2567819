"""What an engine process is told at its start, resolved: no "auto" is left except the number of KV blocks."""

import os
from pathlib import Path
from typing import Literal

import msgspec

from diptych.config import Hardware, LlmConfig, resolve_limits
from diptych.worker.kv_backend import choose_transports
from diptych.worker.parallel import ONE_RANK, ParallelDims
from diptych.worker.plan import CapacityPolicy

# A reader renews the lease of what it copies. After so long without news the owner has given the blocks away: unless
# the user says so, nobody waits longer for them.
_LEASE_S = 30.0


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    model_path: str
    incarnation: str
    device: str = "cpu"
    load_format: str = "auto"  # "dummy": random weights
    kernel: Literal["auto", "torch", "fused"] = "auto"
    num_threads: int = 1  # of each rank
    dims: ParallelDims = ONE_RANK
    tokens_per_block: int = 32
    max_kv_tokens: int | None = None  # None: as many as fit the memory fraction
    kv_memory_fraction: float = 0.9
    kv_dtype: str = "auto"  # "auto": the checkpoint's; "fp8", or the model's own
    quantize: bool = False  # plain weights become FP8 as they are read
    enable_block_reuse: bool = True
    max_batch_size: int = 64
    max_num_tokens: int = 512
    max_seq_len: int | None = None  # None: the model's
    overlap: bool = True  # launch a step before the last one's tokens are read, where the kernels can
    capacity_policy: CapacityPolicy = "GUARANTEED_NO_EVICT"
    transports: tuple[str, ...] = ("shm", "tcp")
    optional_transports: tuple[str, ...] = ()  # left out when they do not work here
    measure_transports: bool = True  # False: taken in this order
    max_tokens_in_flight: int | None = None  # of KV fetches
    transceiver_host: str = "127.0.0.1"
    secret: str | None = None  # of the cluster; the KV channel proves it
    kv_transfer_timeout_s: float = _LEASE_S
    lease_s: float = _LEASE_S
    iteration_stats: bool = False
    log_level: str = "info"


def engine_settings(
    config: LlmConfig, path: Path, hardware: Hardware, *, incarnation: str, secret: str | None
) -> EngineSettings:
    """For a worker's config, on this hardware; `path` is where the model is."""
    limits = resolve_limits(config, hardware)
    kv, transfer, quant = config.kv_cache_config, config.cache_transceiver_config, config.quant_config
    transports = choose_transports(transfer.backend, os.environ)
    timeout_ms = transfer.kv_transfer_timeout_ms
    return EngineSettings(
        model_path=str(path),
        incarnation=incarnation,
        device=limits.device,
        load_format=config.load_format,
        num_threads=max(1, limits.num_threads // config.tensor_parallel_size),
        dims=ParallelDims(tp_size=config.tensor_parallel_size),
        tokens_per_block=kv.tokens_per_block,
        max_kv_tokens=kv.max_tokens,
        kv_memory_fraction=kv.free_gpu_memory_fraction,
        kv_dtype=kv.dtype if quant.kv_cache_quant_algo is None else "fp8",
        quantize=quant.quant_algo is not None,
        enable_block_reuse=kv.enable_block_reuse,
        max_batch_size=limits.max_batch_size,
        max_num_tokens=limits.max_num_tokens,
        max_seq_len=config.max_seq_len,
        overlap=not config.disable_overlap_scheduler,
        capacity_policy=config.scheduler_config.capacity_scheduler_policy,
        transports=transports.required,
        optional_transports=transports.optional,
        measure_transports=not transports.named,
        max_tokens_in_flight=transfer.max_tokens_in_buffer,
        transceiver_host=config.host,
        secret=secret,
        kv_transfer_timeout_s=_LEASE_S if timeout_ms is None else timeout_ms / 1000,
        iteration_stats=config.enable_iter_perf_stats,
        log_level=config.log_level,
    )
