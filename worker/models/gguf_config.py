"""Reads the header of a GGUF file into a ModelConfig."""

from collections.abc import Mapping
from typing import Any

from diptych.errors import ModelLoadError
from diptych.worker.models.config import (
    GGUF_ARCHITECTURES,
    ModelConfig,
    RopeConfig,
    unsupported_architecture,
)
from diptych.worker.models.rope_config import yarn_mscale


def read_gguf_config(
    metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]
) -> ModelConfig:
    architecture = str(metadata.get("general.architecture", "unnamed"))
    if architecture not in GGUF_ARCHITECTURES:
        raise unsupported_architecture(architecture, GGUF_ARCHITECTURES)

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    def require(key: str) -> Any:
        value = get(key)
        if value is None:
            raise ModelLoadError(
                f"The GGUF file has no {architecture}.{key}, which every supported model needs."
            )
        return value

    if get("expert_count", 0):
        raise ModelLoadError(
            f"The GGUF file is a mixture of {get('expert_count')} experts; only dense models are supported."
        )
    if "token_embd.weight" not in tensor_shapes:
        raise ModelLoadError("The GGUF file has no tensor token_embd.weight.")
    num_heads = int(require("attention.head_count"))
    hidden_size = int(require("embedding_length"))
    head_dim = int(get("attention.key_length", hidden_size // num_heads))
    if int(get("rope.dimension_count", head_dim)) != head_dim:
        raise ModelLoadError(
            f"{architecture}.rope.dimension_count is {get('rope.dimension_count')}; only the head size, "
            f"{head_dim}, is supported."
        )
    max_positions = int(require("context_length"))
    return ModelConfig(
        family=GGUF_ARCHITECTURES[architecture],
        vocab_size=tensor_shapes["token_embd.weight"][0],
        hidden_size=hidden_size,
        intermediate_size=int(require("feed_forward_length")),
        num_layers=int(require("block_count")),
        num_heads=num_heads,
        num_kv_heads=int(get("attention.head_count_kv", num_heads)),
        head_dim=head_dim,
        rms_norm_eps=float(require("attention.layer_norm_rms_epsilon")),
        rope=_rope(metadata, architecture, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings="output.weight" not in tensor_shapes,
        qkv_bias="blk.0.attn_q.bias" in tensor_shapes,
        o_bias="blk.0.attn_output.bias" in tensor_shapes,
        qk_norm="blk.0.attn_q_norm.weight" in tensor_shapes,
        sliding_window=get("attention.sliding_window") or None,
        eos_token_ids=_eos(metadata),
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
    )


def _rope(metadata: Mapping[str, Any], architecture: str, max_positions: int) -> RopeConfig:
    prefix = f"{architecture}.rope."
    theta = float(metadata.get(prefix + "freq_base", 10000.0))
    kind = metadata.get(prefix + "scaling.type", "none")
    if kind == "none":
        return RopeConfig(theta=theta)
    factor = float(metadata.get(prefix + "scaling.factor", 1.0))
    if kind == "linear":
        return RopeConfig(theta=theta, kind="linear", factor=factor)
    if kind == "yarn":
        original = int(metadata.get(prefix + "scaling.original_context_length", max_positions))
        return RopeConfig(
            theta=theta,
            kind="yarn",
            factor=factor,
            original_max_positions=original,
            attention_factor=yarn_mscale(factor),
        )
    raise ModelLoadError(f"{prefix}scaling.type is {kind!r}; supported are none, linear, yarn.")


def _eos(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """The end of text and, where it is another token, the end of a chat turn."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return tuple(dict.fromkeys(int(metadata[key]) for key in keys if key in metadata))
