"""The weights of FP8 checkpoints in every published layout, loaded, are those of the same numbers in a plain one."""

import pytest
import torch
from fp8_checkpoints import LAYOUTS, describe, quantize, settled

from diptych.errors import ModelLoadError
from diptych.worker.models.fp8_weights import FP8, StoredWeight, quantize_rows
from diptych.worker.models.loader import dummy_weights, load_config, load_weights
from diptych.worker.models.weights import weight_specs
from diptych.worker.parallel import ParallelDims


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


def relative_error(actual, expected):
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


def test_dummy_weights_of_a_quantized_model(make_checkpoint):
    path, _ = make_checkpoint("Llama", torch.bfloat16)
    describe(path, LAYOUTS["fp8_dynamic"][0])
    config = load_config(path)
    kept, plain = dummy_weights(config, keep_fp8=True), dummy_weights(config)
    assert kept["layers.0.qkv"].dtype == FP8
    assert kept["lm_head"].dtype == plain["layers.0.qkv"].dtype == torch.bfloat16
    wide = kept["layers.0.qkv"].float() * kept["layers.0.qkv_scale"][:, None]
    assert relative_error([wide], [plain["layers.0.qkv"].float()]) < 0.04
    for rank in range(2):
        dims = ParallelDims(tp_size=2, tp_rank=rank)
        part = dummy_weights(config, dims=dims, keep_fp8=True)
        for spec in weight_specs(config):
            if part[spec.name].dtype == FP8:
                whole = kept[spec.name].float() * kept[f"{spec.name}_scale"][:, None]
                found = part[spec.name].float() * part[f"{spec.name}_scale"][:, None]
                assert torch.equal(found, spec.local(whole, dims)), spec.name


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
