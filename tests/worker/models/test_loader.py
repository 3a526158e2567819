"""Loading Hugging Face directories: what comes out, and the one error for each thing that can be wrong."""

import dataclasses
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.errors import ModelLoadError
from diptych.worker.models.loader import dummy_weights, load_config, load_weights
from diptych.worker.models.weights import weight_specs


def load(path):
    fractions = []
    config = load_config(path)
    return config, load_weights(path, config, fractions.append), fractions


def failure(path):
    with pytest.raises(ModelLoadError) as caught:
        load(path)
    return caught.value.message


def edit_json(path, **changes):
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def test_weights_are_joined_converted_and_reported(make_checkpoint):
    path, hf = make_checkpoint("Qwen2", torch.bfloat16, sharded=True)
    config, weights, fractions = load(path)
    assert {spec.name: spec.shape for spec in weight_specs(config)} == {
        name: tuple(weight.shape) for name, weight in weights.items()
    }
    attention = hf.model.layers[1].self_attn
    parts = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    assert torch.equal(weights["layers.1.qkv"].float(), torch.cat(parts))
    assert weights["layers.1.qkv"].dtype == torch.bfloat16
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    wide = load_weights(path, dataclasses.replace(config, dtype="float32"), lambda fraction: None)
    assert torch.equal(wide["layers.1.qkv"], torch.cat(parts))


def test_tied_models_have_no_head_of_their_own(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.float32, tie_word_embeddings=True)
    _, weights, _ = load(path)
    assert "lm_head" not in weights


def test_dummy_weights_are_the_same_everywhere(make_checkpoint):
    path, _ = make_checkpoint("Qwen3", torch.bfloat16)
    config, real, _ = load(path)
    first, second = dummy_weights(config), dummy_weights(config)
    assert {n: (w.shape, w.dtype) for n, w in first.items()} == {
        n: (w.shape, w.dtype) for n, w in real.items()
    }
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["embed_tokens"].float().std() > 0.01


def test_no_such_path(tmp_path):
    assert str(tmp_path / "nothing") in failure(tmp_path / "nothing")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    assert ".gguf" in failure(tmp_path / "model.bin")


def test_missing_config(tmp_path):
    assert "config.json" in failure(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    assert "config.json" in failure(tmp_path)


def test_missing_weights(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.float32)
    (path / "model.safetensors").unlink()
    assert "model.safetensors" in failure(path)
    (path / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin is a pickle" in failure(path)


def test_missing_shard(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.float32, sharded=True)
    shard = sorted(path.glob("model-*.safetensors"))[2]
    shard.unlink()
    assert shard.name in failure(path)


def test_index_that_does_not_fit_its_shards(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.float32, sharded=True)
    shards = sorted(shard.name for shard in path.glob("model-*.safetensors"))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    wrong = next(s for s in shards if s != index["weight_map"]["model.norm.weight"])
    index["weight_map"]["model.norm.weight"] = wrong
    edit_json(path / "model.safetensors.index.json", weight_map=index["weight_map"])
    message = failure(path)
    assert wrong in message
    assert "model.norm.weight" in message
    edit_json(path / "model.safetensors.index.json", weight_map=None)
    assert "weight_map" in failure(path)


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_truncated_file(make_checkpoint, keep):
    path, _ = make_checkpoint("Llama", torch.float32)
    file = path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    message = failure(path)
    assert str(file) in message
    assert "truncated" in message


def test_file_that_is_not_safetensors(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.float32)
    (path / "model.safetensors").write_bytes(struct.pack("<Q", 10) + b"not json..")
    assert "model.safetensors" in failure(path)


def test_missing_tensor(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.float32)
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")
    assert "model.layers.1.mlp.up_proj.weight" in failure(path)


def test_untied_model_without_head(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.float32, tie_word_embeddings=True)
    edit_json(path / "config.json", tie_word_embeddings=False)
    assert "lm_head.weight" in failure(path)


def test_wrong_shape(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.float32)
    edit_json(path / "config.json", intermediate_size=150)
    message = failure(path)
    assert "mlp" in message
    assert "160" in message
    assert "150" in message
