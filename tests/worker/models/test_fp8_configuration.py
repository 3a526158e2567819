"""What a checkpoint says of its precision, and what a worker's options make of it."""

import pytest
import torch
from fp8_checkpoints import FLOAT8, MODELOPT, compressed, describe, settled

from diptych.errors import ModelLoadError
from diptych.worker.models.loader import load_config


def broken(config, **changes):
    return {**config, **changes}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"quant_method": "awq"}, ["quant_method", "awq", "modelopt", "compressed-tensors"]),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, ["quant_algo", "NVFP4", "FP8"]),
        (
            {"quant_method": "modelopt", **MODELOPT, "kv_cache_quant_algo": "NVFP4"},
            ["kv_cache_quant_algo", "NVFP4"],
        ),
        ({"quant_method": "fp8", "activation_scheme": "none"}, ["activation_scheme", "static"]),
        ({"quant_method": "fp8", "fmt": "e5m2"}, ["fmt", "e5m2"]),
        (broken(compressed("tensor", {}), format="pack-quantized"), ["format", "pack-quantized"]),
        (compressed("channel", {}, num_bits=4), ["group_0.weights", "float4", "float8"]),
        (compressed("channel", {"type": "int"}), ["group_0.input_activations", "int8"]),
        (compressed("group", {}), ["strategy", "group", "channel"]),
        (
            broken(compressed("tensor", {}), kv_cache_scheme={"num_bits": 8, "type": "int"}),
            ["kv_cache_scheme", "int8"],
        ),
    ],
)
def test_what_cannot_be_loaded_is_named(config, named, make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.bfloat16)
    describe(path, config)
    with pytest.raises(ModelLoadError) as caught:
        load_config(path)
    assert all(word in caught.value.message for word in named), caught.value.message


@pytest.mark.parametrize(
    ("config", "fp8"),
    [
        ({"quant_method": "modelopt", **MODELOPT, "kv_cache_quant_algo": "FP8"}, True),
        ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": FLOAT8}, True),
        ({"quant_method": "modelopt", **MODELOPT}, False),
        (broken(compressed("tensor", {}), kv_cache_scheme=FLOAT8), True),
        ({"quant_method": "fp8", "kv_cache_scheme": "static"}, True),
    ],
)
def test_what_is_said_of_the_cache(config, fp8, make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.bfloat16)
    describe(path, config)
    found = load_config(path)
    assert found.quantization.fp8_kv is fp8
    assert settled(found, "bfloat16").kv_dtype == "bfloat16"
    assert settled(found, "fp8").kv_dtype == "float8_e4m3fn"


def test_an_ignored_cache_dtype_is_said(make_checkpoint, caplog):
    path, _ = make_checkpoint("Llama", torch.bfloat16)
    config = load_config(path)
    assert settled(config, "float16") == config
    assert "kv_cache_config.dtype float16 is ignored" in caplog.text
    assert config == settled(config)
