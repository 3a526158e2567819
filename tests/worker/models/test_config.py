"""config.json and GGUF metadata to ModelConfig."""

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from diptych.errors import ModelLoadError
from diptych.worker.layers.rope import RotaryEmbedding, inverse_frequencies
from diptych.worker.models.config import ModelConfig, RopeConfig

HF = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
}

GGUF = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 4096,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": 128,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 5000.0,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 7,
    "tokenizer.ggml.bos_token_id": 1,
}


def test_what_config_json_leaves_out_is_derived():
    config = ModelConfig.from_hf(HF)
    assert config.head_dim == 16
    assert config.rope == RopeConfig(theta=10000.0)
    assert config.dtype == "bfloat16"
    assert config.eos_token_ids == (2,)
    assert not config.tie_word_embeddings
    assert ModelConfig.from_hf({**HF, "num_key_value_heads": None}).num_kv_heads == 4


def test_end_tokens_of_the_generation_config_win():
    assert ModelConfig.from_hf(HF, {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert ModelConfig.from_hf(HF, {"temperature": 0.6}).eos_token_ids == (2,)


def test_old_and_new_rope_spellings_mean_the_same():
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    old = {**HF, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    new = {**HF, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(old).rope.theta == 5e5
    oldest = {**HF, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert ModelConfig.from_hf(oldest).rope == RopeConfig(
        kind="linear", factor=2.0, original_max_positions=4096
    )


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("Llama", {"sliding_window": 8}, None),
        ("Mistral", {"sliding_window": 8}, 8),
        ("Mistral", {"sliding_window": None}, None),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": False}, None),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0}, 8),
        ("Qwen3", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, None),
        (
            "Qwen3",
            {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2},
            8,
        ),
    ],
)
def test_sliding_window(family, settings, expected):
    config = ModelConfig.from_hf({**HF, "architectures": [f"{family}ForCausalLM"], **settings})
    assert config.sliding_window == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM"]),
        ({"architectures": None, "model_type": "mamba"}, ["mamba", "LlamaForCausalLM"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"num_key_value_heads": 3}, ["num_kv_heads is 3", "num_heads, which is 4"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["float8_e4m3fn", "bfloat16"]),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, ["longrope", "yarn"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["layer types"]),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 8,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            ["use_sliding_window"],
        ),
    ],
)
def test_what_cannot_be_served_is_refused(settings, words):
    with pytest.raises(ModelLoadError) as caught:
        ModelConfig.from_hf({**HF, **settings})
    assert all(word in caught.value.message for word in words)


def test_gguf():
    shapes = {"token_embd.weight": (100, 64), "blk.0.attn_q.bias": (64,)}
    config = ModelConfig.from_gguf(GGUF, shapes)
    assert (config.vocab_size, config.head_dim, config.num_kv_heads) == (100, 16, 2)
    assert config.tie_word_embeddings
    assert config.qkv_bias
    assert not config.o_bias
    assert config.eos_token_ids == (2, 7)
    assert config.rope == RopeConfig(theta=5000.0)
    assert not ModelConfig.from_gguf(GGUF, {**shapes, "output.weight": (100, 64)}).tie_word_embeddings


def test_gguf_yarn():
    scaling = {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 1024,
    }
    rope = ModelConfig.from_gguf({**GGUF, **scaling}, {"token_embd.weight": (100, 64)}).rope
    settings = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    assert rope == ModelConfig.from_hf({**HF, "rope_theta": 5000.0, "rope_scaling": settings}).rope


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"general.architecture": "gpt2"}, ["gpt2", "llama, qwen2, qwen3"]),
        ({"llama.expert_count": 8}, ["8 experts"]),
        ({"llama.block_count": None}, ["llama.block_count"]),
        ({"llama.rope.dimension_count": 8}, ["rope.dimension_count is 8"]),
        ({"llama.rope.scaling.type": "longrope"}, ["longrope", "yarn"]),
    ],
)
def test_gguf_that_cannot_be_served_is_refused(metadata, words):
    with pytest.raises(ModelLoadError) as caught:
        ModelConfig.from_gguf({**GGUF, **metadata}, {"token_embd.weight": (100, 64)})
    assert all(word in caught.value.message for word in words)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    ],
)
def test_rope_frequencies_equal_transformers(settings):
    settings = {"rope_theta": 1e4, "original_max_position_embeddings": 512, **settings}
    hf = transformers.LlamaConfig(head_dim=64, max_position_embeddings=2048, rope_parameters=settings)
    if settings["rope_type"] == "default":
        expected, factor = 1e4 ** (-torch.arange(0, 64, 2) / 64), 1.0
        length = 4096
    else:
        length = 8192 if settings["rope_type"] == "dynamic" else 2048
        expected, factor = ROPE_INIT_FUNCTIONS[settings["rope_type"]](hf, torch.device("cpu"), seq_len=length)
    rope = ModelConfig.from_hf({**HF, "max_position_embeddings": 2048, "rope_parameters": settings}).rope
    assert torch.allclose(inverse_frequencies(rope, 64, length), expected, rtol=1e-5)
    assert rope.attention_factor == pytest.approx(factor)
    rotary = RotaryEmbedding.build(rope, 64, 16, torch.device("cpu"))
    assert rotary.cos.shape == (16, 32)
    assert rotary.cos[0, 0].item() == pytest.approx(factor)


def test_dynamic_rope_is_plain_within_the_trained_length():
    rope = RopeConfig(kind="dynamic", factor=4.0, original_max_positions=2048)
    assert torch.equal(inverse_frequencies(rope, 64, 2048), inverse_frequencies(RopeConfig(), 64, 2048))
