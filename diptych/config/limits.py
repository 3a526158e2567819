"""Fills in the settings that depend on the hardware. Pure: what it needs to know comes in as arguments."""

from dataclasses import dataclass
from typing import Literal

from diptych.config.llm import LlmConfig

_GPU_BATCH, _GPU_TOKENS = 2048, 8192
# A CPU step of 512 tokens takes a few hundred milliseconds: no running sequence waits longer for a prefill.
_CPU_BATCH, _CPU_TOKENS = 64, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    device: Literal["cpu", "cuda"]
    num_cores: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What was "auto", decided."""

    device: Literal["cpu", "cuda"]
    max_batch_size: int
    max_num_tokens: int
    num_threads: int

    def __str__(self) -> str:
        return (
            f"device {self.device}, max_batch_size {self.max_batch_size}, "
            f"max_num_tokens {self.max_num_tokens}, num_threads {self.num_threads}"
        )


def resolve_limits(config: LlmConfig, hardware: Hardware) -> Limits:
    on_gpu = hardware.device == "cuda"
    max_num_tokens = config.max_num_tokens or (_GPU_TOKENS if on_gpu else _CPU_TOKENS)
    max_batch_size = config.max_batch_size or (_GPU_BATCH if on_gpu else _CPU_BATCH)
    return Limits(
        device=hardware.device,
        max_batch_size=min(max_batch_size, max_num_tokens),  # a step needs one token for each sequence
        max_num_tokens=max_num_tokens,
        num_threads=config.num_threads or hardware.num_cores,
    )
