"""Chooses what runs a model on this machine and builds it; says what the step loop may expect of it."""

import logging
from importlib import import_module
from typing import Literal, Protocol

import torch
from torch import Tensor

from diptych.errors import ConfigError
from diptych.kv_layout import DType, Inner
from diptych.worker.collectives import ALONE, Collectives
from diptych.worker.layers.linear import Dense, cpu_method
from diptych.worker.models.config import Family, ModelConfig
from diptych.worker.models.weights import torch_dtype
from diptych.worker.parallel import ONE_RANK, ParallelDims
from diptych.worker.step import StepBatch

Kernel = Literal["auto", "torch", "fused"]

# The torch model of each family: one line for a family that computes like Llama.
_FAMILIES: dict[Family, str] = {
    "llama": "diptych.worker.models.llama:LlamaModel",
    "mistral": "diptych.worker.models.llama:LlamaModel",
    "qwen2": "diptych.worker.models.llama:LlamaModel",
    "qwen3": "diptych.worker.models.llama:LlamaModel",
}

_log = logging.getLogger(__name__)


class Model(Protocol):
    """A model bound to a KV pool. Not thread-safe: one step at a time."""

    @property
    def kernel_name(self) -> str:
        """For the log and /server_info."""
        ...

    @property
    def inner(self) -> Inner:
        """The order of elements in a KV tile that the pool's layout must name."""
        ...

    @property
    def kv_dtype(self) -> DType:
        """The element type that the pool must have."""
        ...

    def bind(self, pool: Tensor) -> None:
        """From now on use `[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, head_dim]`."""
        ...

    def forward(self, batch: StepBatch) -> Tensor:
        """Write the rows' K and V into the pool; `[R, vocab]` float32, valid until the next call."""
        ...

    def close(self) -> None: ...


def build_model(
    config: ModelConfig,
    weights: dict[str, Tensor],
    device: torch.device,
    *,
    kernel: Kernel,
    num_threads: int,
    tokens_per_block: int,
    max_positions: int | None = None,
    dims: ParallelDims = ONE_RANK,
    ranks: Collectives = ALONE,
) -> Model:
    """Takes the weights out of `weights`. `max_positions`: longest sequence to serve; None: the model's own.

    With several ranks `config` and `weights` are one rank's, and `ranks` is how it speaks to the others.

    "auto" is the fused C++ step on a CPU where it works, else torch; the log says why not.
    """
    positions = max_positions or config.max_position_embeddings
    if kernel != "torch" and device.type == "cpu":
        reason = _unusable(config, tokens_per_block, dims)
        if reason is None:
            from diptych.worker.models.cpu_fused import FusedModel

            return FusedModel(
                config,
                weights,
                num_threads=num_threads,
                tokens_per_block=tokens_per_block,
                max_positions=positions,
            )
        if kernel == "fused":
            raise ConfigError(f"kernel is 'fused', and it cannot run here: {reason}.", param="kernel")
        _log.warning("The fast CPU kernels are not used: %s. Torch runs the model, slower.", reason)
    elif kernel == "fused":
        raise ConfigError(
            f"kernel is 'fused', which runs on a CPU; the device is {device.type}.", param="kernel"
        )
    return _build_eager(config, weights, device, num_threads, positions, dims, ranks)


def _unusable(config: ModelConfig, tokens_per_block: int, dims: ParallelDims) -> str | None:
    if dims.tp_size > 1:
        return "they compute all layers in one call, and ranks must exchange sums in between"
    from diptych.worker.models import cpu_fused

    return cpu_fused.unusable(config, tokens_per_block)


def _build_eager(
    config: ModelConfig,
    weights: dict[str, Tensor],
    device: torch.device,
    num_threads: int,
    max_positions: int,
    dims: ParallelDims,
    ranks: Collectives,
) -> Model:
    from diptych.worker.models.eager import EagerModel

    module, _, name = _FAMILIES[config.family].partition(":")
    family = getattr(import_module(module), name)
    if device.type == "cpu":
        torch.set_num_threads(num_threads)
    method = cpu_method(torch_dtype(config)) if device.type == "cpu" else Dense()
    network = family.build(
        config, weights, device=device, method=method, max_positions=max_positions, dims=dims, ranks=ranks
    )
    return EagerModel(network, config, device, kernel_name=method.name)
