"""The torch model on a GPU computes what it computes on the CPU."""

import pytest
import torch

from diptych.worker.models.build import build_model
from diptych.worker.models.config import ModelConfig, RopeConfig
from diptych.worker.models.weights import dummy_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02), ("float16", 0.01)])
@pytest.mark.parametrize("window", [None, 24])
def test_logits_equal_those_of_the_cpu(dtype, tolerance, window, runner, chunkings, sequences):
    config = ModelConfig(
        family="qwen3",
        vocab_size=131,
        hidden_size=64,
        intermediate_size=160,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        rms_norm_eps=1e-6,
        rope=RopeConfig(),
        max_position_embeddings=256,
        tie_word_embeddings=False,
        qkv_bias=True,
        qk_norm=True,
        sliding_window=window,
        dtype=dtype,
    )
    weights = {name: weight * 5 for name, weight in dummy_weights(config).items()}
    by_device = {}
    for device in ("cpu", "cuda"):
        model = build_model(
            config, dict(weights), torch.device(device), kernel="torch", num_threads=1, tokens_per_block=16
        )
        run = runner(model, config, device=device)
        by_device[device] = [run.run(sequences, chunking(sequences)) for chunking in chunkings.values()]
    for on_cpu, on_gpu in zip(*by_device.values(), strict=True):
        for expected, actual in zip(on_cpu, on_gpu, strict=True):
            assert (actual - expected).norm() / expected.norm() < tolerance
