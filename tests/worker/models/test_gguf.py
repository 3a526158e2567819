"""GGUF files: written here from a random transformers model, loaded back, and damaged in every way."""

import dataclasses

import gguf
import numpy as np
import pytest
import torch
from gguf_writer import write

from diptych.errors import ModelLoadError
from diptych.worker.models.build import build_model
from diptych.worker.models.gguf_file import GgufFile
from diptych.worker.models.loader import load_config, load_weights

QUANT = gguf.GGMLQuantizationType


@pytest.fixture
def llama_file(make_checkpoint, tmp_path):
    _, hf = make_checkpoint("Llama", torch.float32)
    return write(tmp_path / "llama.gguf", hf, "llama")


def load(path):
    config = dataclasses.replace(load_config(path), dtype="float32")
    return config, load_weights(path, config, lambda fraction: None)


def failure(path):
    with pytest.raises(ModelLoadError) as caught:
        load(path)
    return caught.value.message


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_equal_transformers(family, tied, make_checkpoint, tmp_path, runner, chunkings, sequences):
    _, hf = make_checkpoint(family, torch.float32, tie_word_embeddings=tied)
    config, weights = load(write(tmp_path / "model.gguf", hf, family.lower()))
    assert config.tie_word_embeddings == tied
    device = torch.device("cpu")
    model = build_model(config, weights, device, kernel="torch", num_threads=1, tokens_per_block=16)
    actual = runner(model, config).run(sequences, chunkings["whole"](sequences))
    with torch.no_grad():
        for logits, tokens in zip(actual, sequences, strict=True):
            expected = hf(torch.tensor([tokens])).logits[0]
            assert (logits - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [(QUANT.F16, 1e-3), (QUANT.BF16, 4e-3), (QUANT.Q8_0, 0.01), (QUANT.Q5_1, 0.04), (QUANT.Q4_0, 0.15)],
)
def test_number_formats(kind, tolerance, make_checkpoint, tmp_path):
    _, hf = make_checkpoint("Llama", torch.float32)
    _, weights = load(write(tmp_path / "model.gguf", hf, "llama", kind))
    attention = hf.model.layers[2].self_attn
    expected = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
    error = (weights["layers.2.qkv"] - expected).norm() / expected.norm()
    assert error < tolerance


def test_divisors_of_rope_frequencies(make_checkpoint, tmp_path):
    _, hf = make_checkpoint("Llama", torch.float32)
    divisors = np.linspace(1, 8, 16, dtype=np.float32)
    config, _ = load(write(tmp_path / "model.gguf", hf, "llama", divisors=divisors))
    assert config.rope.frequency_divisors == pytest.approx(tuple(divisors.tolist()))


def test_header_values(llama_file):
    file = GgufFile.open(llama_file)
    assert file.metadata["tokenizer.ggml.tokens"] is None
    assert file.metadata["test.nested_float"] == (0.5, 1.5)
    assert file.shape("blk.0.attn_k.weight") == (64, 64)


def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"not a model at all")
    assert "model.gguf" in failure(tmp_path / "model.gguf")
    (tmp_path / "model.gguf").write_bytes(b"")
    assert "model.gguf" in failure(tmp_path / "model.gguf")


@pytest.mark.parametrize("keep", [30, 700, 3000])
def test_truncated_header(llama_file, keep):
    llama_file.write_bytes(llama_file.read_bytes()[:keep])
    assert str(llama_file) in failure(llama_file)


def test_truncated_data(llama_file):
    content = llama_file.read_bytes()
    llama_file.write_bytes(content[: len(content) * 9 // 10])
    message = failure(llama_file)
    assert str(llama_file) in message
    assert "truncated" in message


def test_missing_tensor(llama_file):
    content = llama_file.read_bytes()
    llama_file.write_bytes(content.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    assert "blk.1.ffn_up.weight" in failure(llama_file)


def test_wrong_shape(llama_file):
    config = dataclasses.replace(load_config(llama_file), intermediate_size=150)
    with pytest.raises(
        ModelLoadError, match=r"ffn_\w+\.weight .* \[160, 64\].* \[150, 64\]|\[64, 160\].*\[64, 150\]"
    ):
        load_weights(llama_file, config, lambda fraction: None)


def test_unknown_version(llama_file):
    content = bytearray(llama_file.read_bytes())
    content[4] = 9
    llama_file.write_bytes(content)
    assert "version is 9" in failure(llama_file)
