"""What this machine has, found without importing torch: the HTTP process must stay small."""

import os
from pathlib import Path
from typing import Literal

from diptych.config import Hardware, LlmConfig
from diptych.errors import ConfigError

_DRIVER = Path("/dev/nvidiactl")


def detect(config: LlmConfig) -> Hardware:
    """The device that the config asks for; "auto" is a GPU where there is one that this process may see."""
    has_gpu = _DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1")
    if config.device == "cuda" and not has_gpu:
        raise ConfigError(
            "device is cuda, but this machine has no NVIDIA driver, or CUDA_VISIBLE_DEVICES hides its GPUs"
        )
    device: Literal["cpu", "cuda"] = "cpu" if config.device == "cpu" or not has_gpu else "cuda"
    return Hardware(device=device, num_cores=len(os.sched_getaffinity(0)))
