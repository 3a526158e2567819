"""The fused CPU step behind the same interface: near to transformers, and bit-identical in any chunking."""

import pytest
import torch

from diptych.kernels import cpu_step
from diptych.worker.models.build import build_model
from diptych.worker.models.loader import load_config, load_weights

CASES = {
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "llama_one_kv_head": ("Llama", {"num_key_value_heads": 1}),
    "mistral_window": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
}


@pytest.fixture(autouse=True)
def kernels():
    try:
        cpu_step.isa()
    except cpu_step.KernelUnavailable as error:
        pytest.skip(str(error))


def relative_error(actual, expected):
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_as_near_to_float32_as_transformers(case, make_checkpoint, runner, chunkings, sequences):
    family, settings = CASES[case]
    path, hf = make_checkpoint(family, torch.bfloat16, **settings)
    config = load_config(path)
    weights = load_weights(path, config, lambda fraction: None)
    device = torch.device("cpu")
    model = build_model(config, weights, device, kernel="fused", num_threads=2, tokens_per_block=16)
    try:
        run = runner(model, config)
        by_chunking = [run.run(sequences, chunking(sequences)) for chunking in chunkings.values()]
    finally:
        model.close()
    with torch.no_grad():
        expected = [hf(torch.tensor([tokens])).logits[0] for tokens in sequences]
        hf = hf.to(torch.bfloat16)
        rounded = [hf(torch.tensor([tokens])).logits[0].float() for tokens in sequences]
    assert relative_error(by_chunking[0], expected) < 1.5 * relative_error(rounded, expected) < 0.15
    for other in by_chunking[1:]:
        assert all(torch.equal(a, b) for a, b in zip(by_chunking[0], other, strict=True))
