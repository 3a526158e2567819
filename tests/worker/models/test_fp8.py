"""FP8 checkpoints in every published layout compute what the same numbers do in a plain checkpoint."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.errors import ConfigError, ModelLoadError
from diptych.kernels import attention
from diptych.worker.models.build import build_model
from diptych.worker.models.fp8_weights import FP8, FP8_MAX, StoredWeight, quantize_rows
from diptych.worker.models.loader import dummy_weights, load_config, load_weights
from diptych.worker.models.quantization import Quantization
from diptych.worker.models.weights import weight_specs
from diptych.worker.parallel import ParallelDims
from diptych.worker.precision import with_precision
from diptych.worker.settings import EngineSettings

CPU = torch.device("cpu")
BLOCK = (48, 32)  # divides neither the inputs nor the outputs of all projections
FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}


def compressed(strategy, activations, **weights):
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**FLOAT8, "strategy": strategy, "dynamic": False, **weights},
                "input_activations": {**FLOAT8, **activations},
            }
        },
    }


MODELOPT = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
# What config.json says (None: hf_quant_config.json does), what has a scale, the scale's shape for one of all
# outputs, and its name.
LAYOUTS = {
    "modelopt": (None, "tensor", (), "weight_scale"),
    "modelopt_inside": ({"quant_method": "modelopt", **MODELOPT}, "tensor", (1,), "weight_scale"),
    "modelopt_rows": (
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        "row",
        (-1,),
        "weight_scale",
    ),
    "fp8_static": ({"quant_method": "fp8", "activation_scheme": "static"}, "tensor", (), "weight_scale"),
    "fp8_dynamic": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "tensor", (1,), "weight_scale"),
    "fp8_blocks": (
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)},
        "block",
        None,
        "weight_scale_inv",
    ),
    "compressed_tensor": (
        compressed("tensor", {"strategy": "tensor", "dynamic": False}),
        "tensor",
        (1,),
        "weight_scale",
    ),
    "compressed_channel": (
        compressed("channel", {"strategy": "token", "dynamic": True}),
        "row",
        (-1, 1),
        "weight_scale",
    ),
    "compressed_block": (
        compressed("block", {"strategy": "group", "dynamic": True}, block_structure=list(BLOCK)),
        "block",
        None,
        "weight_scale",
    ),
}


def scales_of(weight, kind):
    """The scale of every element, and the scales alone."""
    size = {"tensor": weight.shape, "row": (1, weight.shape[1]), "block": BLOCK}[kind]
    counts = [-(-whole // part) for whole, part in zip(weight.shape, size, strict=True)]
    spread = torch.empty_like(weight, dtype=torch.float32)
    scales = torch.empty(counts)
    for row in range(counts[0]):
        for column in range(counts[1]):
            here = (
                slice(row * size[0], (row + 1) * size[0]),
                slice(column * size[1], (column + 1) * size[1]),
            )
            scales[row, column] = spread[here] = weight[here].float().abs().max() / FP8_MAX
    return spread, scales


def quantize(path, layout, *, skip="layers.1.mlp"):
    """Turns a plain checkpoint into an FP8 one, and gives back a plain one with the same numbers.

    The projections of `skip` stay as they are, as an exception list would have it; of the second layer's merged
    projections only one is quantized.
    """
    config, kind, shape, name = LAYOUTS[layout]
    tensors = load_file(path / "model.safetensors")
    plain, narrow = dict(tensors), {}
    for key, weight in tensors.items():
        if "_proj.weight" not in key or skip in key or "layers.2.self_attn.k" in key:
            continue
        spread, scales = scales_of(weight, kind)
        narrow[key] = (weight.float() / spread).to(FP8)
        plain[key] = (narrow[key].float() * spread).to(weight.dtype)
        stem = key.removesuffix("weight")
        narrow[stem + name] = scales if shape is None else scales.reshape(shape)
        narrow[stem + "input_scale"] = torch.tensor(0.01)
    other = path.parent / "plain"
    shutil.copytree(path, other)
    save_file(plain, other / "model.safetensors")
    save_file({**tensors, **narrow}, path / "model.safetensors")
    describe(path, config)
    return other


def describe(path, config, **modelopt):
    if config is None:
        text = json.dumps({"producer": {"name": "modelopt"}, "quantization": {**MODELOPT, **modelopt}})
        (path / "hf_quant_config.json").write_text(text)
    else:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))


def add_kv_scales(path, names, *scales):
    tensors = load_file(path / "model.safetensors")
    for layer in range(3):
        for name, scale in zip(names, scales, strict=True):
            tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor(scale * (layer + 1))
    save_file(tensors, path / "model.safetensors")


def settled(config, kv="auto", **settings):
    settings = EngineSettings(model_path="m", incarnation="me", kv_dtype=kv, **settings)
    return with_precision(config, settings, CPU)


def load(path, *, kv="auto", kernel="torch"):
    config = settled(load_config(path), kv)
    weights = load_weights(path, config, lambda fraction: None)
    return config, build_model(config, weights, CPU, kernel=kernel, num_threads=1, tokens_per_block=16)


def relative_error(actual, expected):
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_those_of_the_plain_numbers(layout, make_checkpoint, runner, chunkings, sequences):
    path, _ = make_checkpoint("Qwen3", torch.bfloat16)
    plain = quantize(path, layout)
    steps = chunkings["mixed"](sequences)
    config, model = load(path)
    expected = runner(load(plain)[1], config).run(sequences, steps)
    actual = runner(model, config).run(sequences, steps)
    assert config.quantization.weights == "fp8"
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize("layout", [name for name, (_, kind, *_) in LAYOUTS.items() if kind != "block"])
def test_weights_that_stay_narrow_are_the_same_numbers(layout, make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.bfloat16)
    plain = quantize(path, layout)
    config = load_config(path)
    kept = load_weights(path, config, lambda fraction: None, keep_fp8=True)
    expected = load_weights(plain, load_config(plain), lambda fraction: None)
    narrow = {name for name, weight in kept.items() if weight.dtype == FP8}
    # Of layer 1 the MLP is not quantized, of layer 2 the keys' projection.
    assert narrow == {
        *(f"layers.{layer}.{name}" for layer in (0, 2) for name in ("o", "gate_up", "down")),
        "layers.0.qkv",
        "layers.1.qkv",
        "layers.1.o",
    }
    for name, weight in expected.items():
        actual = kept[name]
        if name in narrow:
            assert kept[f"{name}_scale"].shape == (len(actual),)
            actual = (actual.float() * kept[f"{name}_scale"][:, None]).bfloat16()
        assert torch.equal(actual, weight), name


@pytest.mark.parametrize("keep_fp8", [False, True])
@pytest.mark.parametrize("layout", ["modelopt", "compressed_channel", "fp8_blocks"])
def test_ranks_hold_parts_of_the_same_numbers(layout, keep_fp8, make_checkpoint):
    path, _ = make_checkpoint("Qwen3", torch.bfloat16)
    quantize(path, layout)
    config = load_config(path)
    whole = load_weights(path, config, lambda fraction: None)
    for rank in range(2):
        dims = ParallelDims(tp_size=2, tp_rank=rank)
        part = load_weights(path, config, lambda fraction: None, dims=dims, keep_fp8=keep_fp8)
        assert any(weight.dtype == FP8 for weight in part.values()) is (keep_fp8 and layout != "fp8_blocks")
        for spec in weight_specs(config):
            actual = part[spec.name]
            if actual.dtype == FP8:
                actual = (actual.float() * part[f"{spec.name}_scale"][:, None]).bfloat16()
            assert torch.equal(actual, spec.local(whole[spec.name], dims)), spec.name


def test_weights_whose_size_the_kernels_do_not_take_are_widened(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.bfloat16, intermediate_size=152)
    quantize(path, "fp8_dynamic", skip="nothing")
    kept = load_weights(path, load_config(path), lambda fraction: None, keep_fp8=True)
    assert kept["layers.0.down"].dtype == torch.bfloat16
    assert kept["layers.0.gate_up"].dtype == FP8  # 2 x 152 outputs


@pytest.mark.parametrize(
    ("family", "settings"), [("Llama", {}), ("Qwen3", {}), ("Qwen2", {}), ("Llama", {"attention_bias": True})]
)
@pytest.mark.parametrize("names", [("k_proj.k_scale", "v_proj.v_scale"), ("k_scale", "v_scale")])
def test_scales_of_the_cache_change_no_logit(
    family, settings, names, make_checkpoint, runner, chunkings, sequences
):
    path, _ = make_checkpoint(family, torch.bfloat16, **settings)
    describe(path, None, kv_cache_quant_algo="FP8")
    add_kv_scales(path, names, 0.03, 0.4)
    steps = chunkings["mixed"](sequences)
    config, plain = load(path)
    assert not config.quantization.fp8_kv, "nothing is gained by it on a CPU"
    expected = runner(plain, config).run(sequences, steps)
    with_scales = load_weights(path, settled(config, "fp8"), lambda fraction: None)
    model = build_model(config, with_scales, CPU, kernel="torch", num_threads=1, tokens_per_block=16)
    run = runner(model, config)
    actual = run.run(sequences, steps)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    unscaled = runner(plain, config)
    unscaled.run(sequences, steps)
    for layer, (key, value) in enumerate([(1 / 32, 0.5), (1 / 16, 1.0), (1 / 8, 2.0)]):
        for which, factor in enumerate((key, value)):
            stored = run.pool[:, layer, which].nan_to_num()
            assert torch.equal(stored * factor, unscaled.pool[:, layer, which].nan_to_num())


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_an_fp8_cache_holds_rounded_numbers_and_no_more(
    family, make_checkpoint, runner, chunkings, sequences, monkeypatch
):
    path, _ = make_checkpoint(family, torch.bfloat16)
    describe(path, None, kv_cache_quant_algo="FP8")
    add_kv_scales(path, ("k_proj.k_scale", "v_proj.v_scale"), 0.03, 0.04)
    config, model = load(path, kv="fp8")
    run = runner(model, config)
    assert run.pool.dtype == FP8
    actual = [run.run(sequences, chunking(sequences)) for chunking in chunkings.values()]

    def append_rounded(key, value, cache, plan):
        attention.append_kv(key.to(FP8).to(key.dtype), value.to(FP8).to(key.dtype), cache, plan)

    monkeypatch.setattr("diptych.worker.layers.attention.append_kv", append_rounded)
    weights = load_weights(path, config, lambda fraction: None)
    wide = dataclasses.replace(config, quantization=Quantization())
    model = build_model(wide, weights, CPU, kernel="torch", num_threads=1, tokens_per_block=16)
    run = runner(model, wide)
    assert run.pool.dtype == torch.bfloat16
    expected = [run.run(sequences, chunking(sequences)) for chunking in chunkings.values()]
    for one, other in zip(actual, expected, strict=True):
        assert all(torch.equal(a, e) for a, e in zip(one, other, strict=True))


def test_a_cache_that_overflows_holds_its_largest_number(make_checkpoint, runner, sequences, chunkings):
    path, _ = make_checkpoint("Llama", torch.bfloat16)
    add_kv_scales(path, ("k_scale", "v_scale"), 1e-5, 1e-5)
    config, model = load(path, kv="fp8")
    run = runner(model, config)
    logits = run.run(sequences, chunkings["whole"](sequences))
    assert run.pool.float().nan_to_num().abs().max() == FP8_MAX
    assert all(rows.isfinite().all() for rows in logits)


def test_the_fused_cpu_step_runs_fp8_checkpoints(make_checkpoint, runner, chunkings, sequences):
    path, _ = make_checkpoint("Llama", torch.bfloat16)
    plain = quantize(path, "compressed_channel")
    steps = chunkings["mixed"](sequences)
    by_path = []
    for each in (path, plain):
        try:
            config, model = load(each, kernel="fused")
        except ConfigError as error:
            pytest.skip(str(error))
        by_path.append(runner(model, config).run(sequences, steps))
        model.close()
    assert all(torch.equal(a, e) for a, e in zip(*by_path, strict=True))


def test_the_fused_cpu_step_has_no_fp8_cache(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.bfloat16)
    with pytest.raises(ConfigError, match="FP8 cache"):
        load(path, kv="fp8", kernel="fused")


def test_dummy_weights_of_a_quantized_model(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.bfloat16)
    describe(path, LAYOUTS["fp8_dynamic"][0])
    config = load_config(path)
    kept, plain = dummy_weights(config, keep_fp8=True), dummy_weights(config)
    assert kept["layers.0.qkv"].dtype == FP8
    assert kept["lm_head"].dtype == plain["layers.0.qkv"].dtype == torch.bfloat16
    wide = kept["layers.0.qkv"].float() * kept["layers.0.qkv_scale"][:, None]
    assert relative_error([wide], [plain["layers.0.qkv"].float()]) < 0.04


def test_a_plain_checkpoint_becomes_fp8_when_it_is_loaded(make_checkpoint, monkeypatch):
    path, _ = make_checkpoint("Llama", torch.bfloat16)
    config = load_config(path)
    assert settled(config, quantize=True) == config, "nothing is gained on a CPU"
    monkeypatch.setattr("diptych.worker.precision.has_fp8", lambda _: True)
    plain = load_weights(path, config, lambda fraction: None)
    asked = settled(config, quantize=True)
    kept = load_weights(path, asked, lambda fraction: None, keep_fp8=True)
    assert kept["lm_head"].dtype == torch.bfloat16
    for name in ("qkv", "o", "gate_up", "down"):
        values, scale = quantize_rows(plain[f"layers.1.{name}"])
        assert torch.equal(kept[f"layers.1.{name}"].float(), values.float())
        assert torch.equal(kept[f"layers.1.{name}_scale"], scale)


def test_rows_are_quantized_by_their_largest_number():
    rows = torch.tensor([[1.0, -4.0, 0.5], [0.0, 0.0, 0.0], [3e4, 1.0, -1.0]])
    values, scales = quantize_rows(rows)
    assert values.float()[0].tolist() == [112, -448, 56]
    assert torch.equal(values.float()[1], torch.zeros(3))
    assert torch.allclose(values.float()[2] * scales[2], rows[2], atol=0.05)


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


@pytest.mark.parametrize(
    ("values", "scale", "block", "named"),
    [
        (torch.zeros(4, 8, dtype=FP8), None, None, "no scale"),
        (torch.zeros(4, 8, dtype=torch.float8_e5m2), torch.ones(1), None, "float8_e5m2"),
        (torch.zeros(4, 8, dtype=torch.uint8), torch.ones(1), None, "uint8"),
        (torch.zeros(4, 8), torch.ones(1), None, "float32"),
        (torch.zeros(4, 8, dtype=FP8), torch.ones(8), None, "4 rows"),
        (torch.zeros(4, 8, dtype=FP8), torch.ones(2, 2), (2, 2), "[2, 4]"),
    ],
)
def test_numbers_and_scales_that_do_not_fit(values, scale, block, named):
    with pytest.raises(ModelLoadError) as caught:
        StoredWeight.of("a.weight", values, scale, block)
    assert named in caught.value.message
    assert "a.weight" in caught.value.message


def test_an_ignored_cache_dtype_is_said(make_checkpoint, caplog):
    path, _ = make_checkpoint("Llama", torch.bfloat16)
    config = load_config(path)
    assert settled(config, "float16") == config
    assert "kv_cache_config.dtype float16 is ignored" in caplog.text
    assert config == settled(config)
