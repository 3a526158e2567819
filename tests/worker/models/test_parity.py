"""The torch model computes what transformers does on the same checkpoint, however rows are cut into steps."""

import pytest
import torch

from diptych.worker.models.build import build_model
from diptych.worker.models.loader import load_config, load_weights

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

CASES = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_no_gqa": ("Llama", {"num_key_value_heads": 4}),
    "llama_one_kv_head": ("Llama", {"num_key_value_heads": 1}),
    "llama_biases": ("Llama", {"attention_bias": True}),
    "llama_llama3_rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_linear_rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    ),
    "llama_sharded": ("Llama", {"sharded": True}),
    "mistral_window": ("Mistral", {"sliding_window": 24}),
    "mistral_no_window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 0}),
    "qwen3": ("Qwen3", {}),
    "qwen3_tied": ("Qwen3", {"tie_word_embeddings": True}),
}


def reference(model, sequences, dtype=torch.float32):
    with torch.no_grad():
        return [model.to(dtype)(torch.tensor([tokens])).logits[0].float() for tokens in sequences]


def relative_error(actual, expected):
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


def load(path):
    config = load_config(path)
    weights = load_weights(path, config, lambda fraction: None)
    device = torch.device("cpu")
    return config, build_model(config, weights, device, kernel="torch", num_threads=1, tokens_per_block=16)


@pytest.mark.parametrize("case", CASES)
def test_float32_logits_equal_transformers(case, make_checkpoint, runner, chunkings, sequences):
    family, settings = CASES[case]
    path, hf = make_checkpoint(family, torch.float32, **settings)
    config, model = load(path)
    expected = reference(hf, sequences)
    for chunking in chunkings.values():
        actual = runner(model, config).run(sequences, chunking(sequences))
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("case", ["llama", "mistral_window", "qwen2", "qwen3_tied"])
def test_bfloat16_logits_are_as_near_to_float32_as_transformers(
    case, make_checkpoint, runner, chunkings, sequences
):
    family, settings = CASES[case]
    path, hf = make_checkpoint(family, torch.bfloat16, **settings)
    config, model = load(path)
    assert config.dtype == "bfloat16"
    expected = reference(hf, sequences)
    error_of_transformers = relative_error(reference(hf, sequences, torch.bfloat16), expected)
    for chunking in chunkings.values():
        actual = runner(model, config).run(sequences, chunking(sequences))
        assert relative_error(actual, expected) < 1.5 * error_of_transformers < 0.1


def test_only_the_rows_asked_for(make_checkpoint, runner, sequences, chunkings):
    path, _ = make_checkpoint("Llama", torch.float32)
    config, model = load(path)
    run = runner(model, config)
    batch = run.batch(sequences, chunkings["mixed"](sequences)[0])
    every = model.forward(batch).clone()
    chosen = type(batch)(
        batch.token_ids,
        batch.positions,
        batch.sequence_ids,
        batch.block_tables,
        batch.logits_rows[[3, 0]],
    )
    assert torch.allclose(model.forward(chosen), every[[3, 0]], atol=1e-5)
    none = type(batch)(
        batch.token_ids, batch.positions, batch.sequence_ids, batch.block_tables, batch.logits_rows[:0]
    )
    assert model.forward(none).shape == (0, config.vocab_size)
