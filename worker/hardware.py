"""What this machine has, found without importing torch: the HTTP process must stay small."""

import os
from pathlib import Path

from diptych.config import Hardware, LlmConfig
from diptych.errors import ConfigError


def detect(config: LlmConfig) -> Hardware:
    has_gpu = Path("/dev/nvidiactl").exists()
    if config.device == "cuda" and not has_gpu:
        raise ConfigError("device is cuda, but this machine has no NVIDIA driver")
    # The GPU engine is not in this version: "auto" means the CPU.
    return Hardware(
        device="cuda" if config.device == "cuda" else "cpu", num_cores=len(os.sched_getaffinity(0))
    )
