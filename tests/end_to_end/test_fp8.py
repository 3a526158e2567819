"""A whole FP8 checkpoint on CPUs: served, its FP8 cache moved from worker to worker."""

import asyncio

import pytest
import torch
from mesh import get, mesh
from safetensors.torch import save_file

from diptych.worker.models.fp8_weights import quantize_rows
from diptych.worker.models.loader import load_config
from diptych.worker.models.weights import dummy_weights, weight_specs
from tests.end_to_end.test_cuda import PROMPT_LENGTHS, answers, write_model
from tests.worker.fp8_checkpoints import FLOAT8, compressed

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "quantization_config": {
        **compressed("channel", {"strategy": "token", "dynamic": True}),
        "kv_cache_scheme": {**FLOAT8, "strategy": "tensor", "dynamic": False},
    },
}


def write_weights(path):
    config = load_config(path)
    weights = dummy_weights(config)
    tensors = {}
    for spec in weight_specs(config):
        rows = [part.shape[0] for part in spec.parts]
        for part, weight in zip(spec.parts, weights[spec.name].split(rows), strict=True):
            if "_proj" in part.hf_name:
                weight, scale = quantize_rows(weight * 8)
                tensors[f"{part.hf_name}_scale"] = scale[:, None]
            tensors[part.hf_name] = weight.contiguous()
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}.self_attn"
        tensors |= {f"{prefix}.k_scale": torch.tensor([0.01]), f"{prefix}.v_scale": torch.tensor([0.02])}
    save_file(tensors, path / "model.safetensors")


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    model = write_model(folder / "model", **SHAPE)
    write_weights(model)
    options = {"model": str(model), "num_threads": 1, "cache_transceiver_config": {"backend": "SHM"}}
    fp8 = {"kv_cache_config": {"dtype": "fp8", "max_tokens": 4096}}
    plain = {"kv_cache_config": {"max_tokens": 4096}}
    with mesh(folder) as started:
        workers = {
            "aggregated": started.worker("aggregated", **options, **fp8),
            "context": started.worker("context", "CONTEXT", **options, **fp8),
            "generation": started.worker("generation", "GENERATION", **options, **fp8),
            "plain": started.worker("plain", "GENERATION", **options, **plain),
        }
        routers = {
            f"router_{name}": started.router(f"router_{name}", [workers["context"]], [workers[name]])
            for name in ("generation", "plain")
        }
        for server in (*workers.values(), *routers.values()):
            server.wait_ready()
        yield {**workers, **routers}


def test_an_fp8_cache_moves_as_any_other(servers):
    expected = asyncio.run(answers(servers["aggregated"].url))
    assert all(len(tokens) == 24 for tokens in expected)
    assert asyncio.run(answers(servers["router_generation"].url)) == expected
    assert "FP8 weights are made bfloat16" in servers["aggregated"].log.read_text()
    moved = get(f"{servers['generation'].url}/perf_metrics")
    assert [request["transport"] for request in moved] == ["shm"] * len(PROMPT_LENGTHS)


def test_caches_of_different_types_are_not_mixed(servers):
    """The worker computes the prompt itself, and says why."""
    found = asyncio.run(answers(servers["router_plain"].url))
    assert [len(tokens) for tokens in found] == [24] * len(PROMPT_LENGTHS)
    assert "dtype is 'float8_e4m3fn' there and 'bfloat16' here" in servers["plain"].log.read_text()
    blocks = servers["context"].blocks()
    assert blocks["active"] == blocks["leased"] == 0
