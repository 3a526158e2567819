"""In what a model's weights and its KV cache are kept: the checkpoint, the settings and the device decide."""

import logging
from dataclasses import replace

import torch

from diptych.errors import ConfigError
from diptych.worker.models.config import ModelConfig
from diptych.worker.models.quantization import Quantization
from diptych.worker.settings import EngineSettings

log = logging.getLogger(__name__)

_FIRST_WITH_FP8 = (8, 9)


def has_fp8(device: torch.device) -> bool:
    """Whether a device computes with float8_e4m3fn."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FIRST_WITH_FP8


def with_precision(config: ModelConfig, settings: EngineSettings, device: torch.device) -> ModelConfig:
    """`config` with its quantization settled. ConfigError for what the device cannot do."""
    fast = has_fp8(device)
    fp8_kv = _fp8_kv(config, settings.kv_dtype, device, fast=fast)
    found = replace(config.quantization, fp8_kv=fp8_kv)
    if settings.quantize and found.weights == "plain":
        if fast:
            found = Quantization("fp8", fp8_kv=fp8_kv, when_loaded=True)
        else:
            log.warning("quant_config.quant_algo FP8 is ignored: nothing is gained by it on this device")
    return replace(config, quantization=found)


def _fp8_kv(config: ModelConfig, asked: str, device: torch.device, *, fast: bool) -> bool:
    """ "auto": as the checkpoint says, where it gains something. "fp8": on a CPU, too, to try it."""
    if asked == "fp8":
        if device.type == "cuda" and not fast:
            raise ConfigError(
                "kv_cache_config.dtype is fp8, which this GPU does not compute with; use auto.",
                param="kv_cache_config.dtype",
            )
        return True
    if asked not in ("auto", config.dtype):
        log.warning(
            "kv_cache_config.dtype %s is ignored: the KV cache is %s as the model", asked, config.dtype
        )
    return asked == "auto" and config.quantization.fp8_kv and fast
