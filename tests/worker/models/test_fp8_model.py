"""A model of FP8 weights, or with an FP8 cache, computes what the same numbers do without FP8."""

import dataclasses

import pytest
import torch
from fp8_checkpoints import CPU, LAYOUTS, add_kv_scales, describe, quantize, settled

from diptych.errors import ConfigError
from diptych.kernels import attention
from diptych.worker.models.build import build_model
from diptych.worker.models.fp8_weights import FP8, FP8_MAX
from diptych.worker.models.loader import load_config, load_weights
from diptych.worker.models.quantization import Quantization


def load(path, *, kv="auto", kernel="torch"):
    config = settled(load_config(path), kv)
    weights = load_weights(path, config, lambda fraction: None)
    return config, build_model(config, weights, CPU, kernel=kernel, num_threads=1, tokens_per_block=16)


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
