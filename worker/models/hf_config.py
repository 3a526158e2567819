"""Reads a Hugging Face config.json (and generation_config.json) into a ModelConfig."""

from collections.abc import Mapping
from typing import Any

from diptych.errors import ModelLoadError
from diptych.kv_layout import DType
from diptych.worker.models.config import HF_ARCHITECTURES, Family, ModelConfig, unsupported_architecture
from diptych.worker.models.quantization import read_quantization
from diptych.worker.models.rope_config import read_rope

_DTYPES: dict[str, DType] = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}


def read_hf_config(
    config: Mapping[str, Any], generation_config: Mapping[str, Any], modelopt_config: Mapping[str, Any]
) -> ModelConfig:
    family = _family(config)
    _refuse_what_would_be_wrong(config)
    num_heads = int(_require(config, "num_attention_heads"))
    hidden_size = int(_require(config, "hidden_size"))
    max_positions = int(_require(config, "max_position_embeddings"))
    attention_bias = bool(config.get("attention_bias", False))
    eos = generation_config.get("eos_token_id")
    return ModelConfig(
        family=family,
        vocab_size=int(_require(config, "vocab_size")),
        hidden_size=hidden_size,
        intermediate_size=int(_require(config, "intermediate_size")),
        num_layers=int(_require(config, "num_hidden_layers")),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or hidden_size // num_heads),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=read_rope(config, max_positions),
        max_position_embeddings=max_positions,
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias and family != "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=_sliding_window(config, family),
        eos_token_ids=_token_ids(config.get("eos_token_id") if eos is None else eos),
        bos_token_id=config.get("bos_token_id"),
        dtype=_dtype(config),
        quantization=read_quantization(config, modelopt_config),
    )


def _require(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise ModelLoadError(f"config.json has no {key!r}, which every supported model needs.")
    return value


def _family(config: Mapping[str, Any]) -> Family:
    architectures = config.get("architectures") or []
    for name in architectures:
        if name in HF_ARCHITECTURES:
            return HF_ARCHITECTURES[name]
    named = ", ".join(architectures) or str(config.get("model_type", "unnamed"))
    raise unsupported_architecture(named, HF_ARCHITECTURES)


def _refuse_what_would_be_wrong(config: Mapping[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise ModelLoadError(f"hidden_act is {config['hidden_act']!r}; only 'silu' is supported.")
    if config.get("mlp_bias"):
        raise ModelLoadError("mlp_bias is true; only MLPs without bias are supported.")


def _sliding_window(config: Mapping[str, Any], family: Family) -> int | None:
    if family == "llama" or config.get("sliding_window") is None:
        return None
    window = int(config["sliding_window"])
    if family == "mistral":
        return window
    if not config.get("use_sliding_window", False):
        return None
    if _windowed_layers(config) == {True}:
        return window
    if _windowed_layers(config) == {False}:
        return None
    raise ModelLoadError(
        "Some layers use a sliding window and some do not, which is not supported; set use_sliding_window "
        "to false in config.json to serve with full attention."
    )


def _windowed_layers(config: Mapping[str, Any]) -> set[bool]:
    layer_types = config.get("layer_types")
    if layer_types:
        return {kind == "sliding_attention" for kind in layer_types}
    first = int(config.get("max_window_layers", 0))
    return {layer >= first for layer in range(int(_require(config, "num_hidden_layers")))}


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _dtype(config: Mapping[str, Any]) -> DType:
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if named not in _DTYPES:
        raise ModelLoadError(f"dtype is {named!r}; supported are {', '.join(_DTYPES)}.")
    return _DTYPES[named]
