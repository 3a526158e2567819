"""What a model is, whatever file format said so: the one description that layers, loaders and kernels read.

`ModelConfig.from_hf` reads a Hugging Face config.json, `ModelConfig.from_gguf` the header of a GGUF file.
Anything that would make the model compute something else than its authors meant is refused here, with the
reason.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from diptych.errors import ModelLoadError
from diptych.kv_layout import DType
from diptych.worker.models.quantization import Quantization

Family = Literal["llama", "mistral", "qwen2", "qwen3"]
RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

HF_ARCHITECTURES: dict[str, Family] = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
# Mistral's GGUF files call themselves llama.
GGUF_ARCHITECTURES: dict[str, Family] = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: the base, and how it is stretched beyond the trained length."""

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int = 0  # trained length; set for dynamic, llama3 and yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    truncate: bool = True  # yarn: whole dimensions only
    attention_factor: float = 1.0  # multiplies cos and sin
    # GGUF keeps llama3's stretching as one divisor for each frequency; empty: none.
    frequency_divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of the Llama kind."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: DType = "bfloat16"  # of activations, and of weights that are not quantized
    quantization: Quantization = field(default_factory=Quantization)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ModelLoadError(f"{name} is {getattr(self, name)}: a model needs at least 1.")
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"num_kv_heads is {self.num_kv_heads}: it must divide num_heads, which is {self.num_heads}."
            )
        if self.head_dim % 2:
            raise ModelLoadError(f"head_dim is {self.head_dim}: rotary embedding needs an even one.")

    @property
    def kv_dtype(self) -> DType:
        return "float8_e4m3fn" if self.quantization.fp8_kv else self.dtype

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        generation_config: Mapping[str, Any] | None = None,
        modelopt_config: Mapping[str, Any] | None = None,
    ) -> "ModelConfig":
        """`modelopt_config`: hf_quant_config.json, which ModelOpt writes beside config.json."""
        from diptych.worker.models.hf_config import read_hf_config

        return read_hf_config(config, generation_config or {}, modelopt_config or {})

    @classmethod
    def from_gguf(
        cls, metadata: Mapping[str, Any], tensor_shapes: Mapping[str, tuple[int, ...]]
    ) -> "ModelConfig":
        """`tensor_shapes`, by GGUF name, tell what the metadata leaves out: biases, tying, vocabulary."""
        from diptych.worker.models.gguf_config import read_gguf_config

        return read_gguf_config(metadata, tensor_shapes)


def unsupported_architecture(name: str, supported: Mapping[str, Family]) -> ModelLoadError:
    return ModelLoadError(f"Architecture {name!r} is not supported; supported are {', '.join(supported)}.")
