"""What an engine process is told at its start, resolved: no "auto" is left except the number of KV blocks."""

from typing import Literal

import msgspec

from diptych.worker.scheduler import CapacityPolicy


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    model_path: str
    incarnation: str
    device: str = "cpu"
    load_format: str = "auto"  # "dummy": random weights
    kernel: Literal["auto", "torch", "fused"] = "auto"
    num_threads: int = 1
    tokens_per_block: int = 32
    max_kv_tokens: int | None = None  # None: as many as fit the memory fraction
    kv_memory_fraction: float = 0.9
    enable_block_reuse: bool = True
    max_batch_size: int = 64
    max_num_tokens: int = 512
    max_seq_len: int | None = None  # None: the model's
    capacity_policy: CapacityPolicy = "GUARANTEED_NO_EVICT"
    transports: tuple[str, ...] = ("shm", "tcp")
    optional_transports: tuple[str, ...] = ()  # left out when they do not work here
    measure_transports: bool = True  # False: taken in this order
    max_tokens_in_flight: int | None = None  # of KV fetches
    transceiver_host: str = "127.0.0.1"
    secret: str | None = None  # of the cluster; the KV channel proves it
    kv_transfer_timeout_s: float = 60.0
    lease_s: float = 30.0
    iteration_stats: bool = False
    log_level: str = "info"
