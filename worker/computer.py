"""What computes an engine's steps: a model with its weights loaded, before it has a KV pool, and the runner it becomes.

Chosen once at the start: fused kernels on a GPU (cuda_computer.py), else a `Model` of models/build.py.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from diptych.errors import DiptychError, ModelLoadError
from diptych.kv_layout import DType, Inner
from diptych.worker.collectives import Collectives
from diptych.worker.engine import Runner
from diptych.worker.kv_memory import device_of
from diptych.worker.models.build import Model, build_model
from diptych.worker.models.config import ModelConfig
from diptych.worker.models.loader import dummy_weights, load_weights
from diptych.worker.precision import has_fp8, with_precision
from diptych.worker.runner import ModelRunner
from diptych.worker.sampler import Sampler
from diptych.worker.settings import EngineSettings

log = logging.getLogger(__name__)

# What is going on, and how much of it is done, 0 to 1.
Progress = Callable[[str, float], None]


class Computer(Protocol):
    @property
    def kernel_name(self) -> str: ...
    @property
    def inner(self) -> Inner: ...
    @property
    def kv_dtype(self) -> DType: ...
    @property
    def overlaps(self) -> bool:
        """Whether its runner returns from `launch` before the step is over."""
        ...

    def reserved_bytes(self) -> int:
        """Device memory that the largest step takes beside weights and pool."""
        ...

    def start(self, pool: Tensor, max_seq_len: int, progress: Progress) -> Runner[Any]: ...


@dataclass(frozen=True, slots=True)
class PlainComputer:
    model: Model
    sampler: Sampler | None  # None where another rank draws
    overlaps: bool = False

    @property
    def kernel_name(self) -> str:
        return self.model.kernel_name

    @property
    def inner(self) -> Inner:
        return self.model.inner

    @property
    def kv_dtype(self) -> DType:
        return self.model.kv_dtype

    def reserved_bytes(self) -> int:
        return 0

    def start(self, pool: Tensor, max_seq_len: int, progress: Progress) -> ModelRunner:
        self.model.bind(pool)
        return ModelRunner(self.model, self.sampler)


def load_computer(
    settings: EngineSettings, config: ModelConfig, progress: Progress, ranks: Collectives
) -> Computer:
    """Loads this rank's weights; `config` is the whole model's. ModelLoadError when that fails."""
    path, device, dims = Path(settings.model_path), device_of(settings), settings.dims
    config = with_precision(config, settings, device)
    try:
        reason = None
        if device.type == "cuda" and settings.kernel != "torch":
            from diptych.worker.cuda_computer import unusable

            reason = unusable(config, device)
            if reason is None:
                return _load_cuda(settings, config, path, progress, ranks)
            log.warning("The fused GPU kernels are not used: %s. Torch runs the model, much slower.", reason)
        weights = _weights(settings, config, path, progress, None, keep_fp8=False)
        model = build_model(
            dims.local(config),
            weights,
            device,
            kernel="torch" if device.type == "cuda" else settings.kernel,
            num_threads=settings.num_threads,
            tokens_per_block=settings.tokens_per_block,
            dims=dims,
            ranks=ranks,
        )
        return PlainComputer(model, None if dims.tp_rank else Sampler(frozenset(config.eos_token_ids)))
    except DiptychError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        log.exception("loading %s failed", path)
        raise ModelLoadError(f"cannot load the model at {path}: {type(error).__name__}: {error}") from error


def _load_cuda(
    settings: EngineSettings, config: ModelConfig, path: Path, progress: Progress, ranks: Collectives
) -> Computer:
    from diptych.worker.cuda_computer import CudaComputer

    device = device_of(settings)
    weights = _weights(settings, config, path, progress, device, keep_fp8=has_fp8(device))
    return CudaComputer(settings, settings.dims.local(config), weights, device, ranks)


def _weights(
    settings: EngineSettings,
    config: ModelConfig,
    path: Path,
    progress: Progress,
    device: torch.device | None,
    *,
    keep_fp8: bool,
) -> dict[str, Tensor]:
    quantization = config.quantization
    if quantization.weights == "fp8" and (quantization.block or not keep_fp8):
        reason = "nothing here computes with FP8" if not keep_fp8 else "their scales are for blocks"
        log.warning("The model's FP8 weights are made %s: %s. Nothing is gained.", config.dtype, reason)
    if settings.load_format == "dummy":
        return dummy_weights(config, device=device, dims=settings.dims, keep_fp8=keep_fp8)

    def show(fraction: float) -> None:
        progress("loading weights", fraction)

    return load_weights(path, config, show, device, dims=settings.dims, keep_fp8=keep_fp8)
