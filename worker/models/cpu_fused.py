"""Runs a model through the fused CPU step (kernels/cpu_step.py): one C++ call for all layers."""

import torch
from torch import Tensor

from diptych.kernels import cpu_step
from diptych.kv_layout import DType, Inner
from diptych.worker.layers.rope import RotaryEmbedding
from diptych.worker.models.config import ModelConfig
from diptych.worker.step import StepBatch


def unusable(config: ModelConfig, tokens_per_block: int) -> str | None:
    """Why the fused step cannot run this model on this machine; None: it can. Compiles it if need be."""
    if config.dtype == "float32":
        return "they compute in bfloat16, and the dtype is float32"
    if config.quantization.fp8_kv:
        return "they keep K and V in bfloat16, and an FP8 cache is asked for"
    if config.o_bias:
        return "they have no bias on the attention's output, and this model has one"
    try:
        cpu_step.isa()
    except cpu_step.KernelUnavailable as error:
        return str(error)
    return cpu_step.supports(step_shape(config, tokens_per_block))


def step_shape(config: ModelConfig, tokens_per_block: int) -> cpu_step.StepShape:
    return cpu_step.StepShape(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        tokens_per_block=tokens_per_block,
        rms_norm_eps=config.rms_norm_eps,
        attention_scale=config.head_dim**-0.5,
        qk_norm=config.qk_norm,
        qkv_bias=config.qkv_bias,
        sliding_window=config.sliding_window,
    )


class FusedModel:
    """The `Model` of build.py over CpuStep. K and V are bfloat16 in the kernels' own order."""

    inner: Inner = "vnni"
    kv_dtype: DType = "bfloat16"

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        *,
        num_threads: int,
        tokens_per_block: int,
        max_positions: int,
    ) -> None:
        rotary = RotaryEmbedding.build(config.rope, config.head_dim, max_positions, torch.device("cpu"))
        if config.tie_word_embeddings:
            weights["lm_head"] = weights["embed_tokens"]
        shape = step_shape(config, tokens_per_block)
        self._step = cpu_step.CpuStep(shape, weights, rotary.cos, rotary.sin, num_threads)
        # The step has packed its own copy.
        weights.clear()
        self.kernel_name = f"fused-{cpu_step.isa()}"

    def bind(self, pool: Tensor) -> None:
        self._step.bind(pool)

    def forward(self, batch: StepBatch) -> Tensor:
        return self._step.forward(
            batch.token_ids, batch.positions, batch.sequence_ids, batch.block_tables, batch.logits_rows
        )

    def close(self) -> None:
        self._step.close()
