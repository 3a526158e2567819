"""Sections of a worker's options: KV cache, scheduler, transceiver. Names and defaults are TensorRT-LLM's."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
PositiveFloat = Annotated[float, Meta(gt=0)]
Fraction = Annotated[float, Meta(gt=0, le=1)]

CapacityPolicy = Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION"]
TransferBackend = Literal["DEFAULT", "UCX", "NIXL", "MPI", "MOONCAKE", "SHM", "TCP"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCacheConfig:
    enable_block_reuse: bool = True
    tokens_per_block: PositiveInt = 32
    max_tokens: PositiveInt | None = None  # None: as many as free_gpu_memory_fraction allows
    free_gpu_memory_fraction: Fraction = 0.9
    dtype: Literal["auto", "bfloat16", "float16", "float32", "fp8"] = "auto"
    host_cache_size: NonNegativeInt | None = None  # bytes
    event_buffer_max_size: NonNegativeInt = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """What to make of a checkpoint that is not quantized."""

    quant_algo: Literal["FP8"] | None = None
    kv_cache_quant_algo: Literal["FP8"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    capacity_scheduler_policy: CapacityPolicy = "GUARANTEED_NO_EVICT"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTransceiverConfig:
    """DEFAULT takes the fastest transport that both ends have; SHM and TCP are ours, the rest upstream's.

    `max_tokens_in_buffer`: of all fetches that run at once; one that is longer runs alone.
    """

    backend: TransferBackend | None = "DEFAULT"
    max_tokens_in_buffer: PositiveInt | None = None
    kv_transfer_timeout_ms: PositiveInt | None = None
