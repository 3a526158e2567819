"""From a worker's options to what its engine is told."""

from pathlib import Path

import pytest

from diptych.config import Hardware, load_llm_config
from diptych.errors import ConfigError
from diptych.worker.settings import engine_settings


@pytest.mark.parametrize("disabled", [False, True])
def test_the_overlap_scheduler_can_be_disabled(tmp_path, disabled):
    options = tmp_path / "options.yaml"
    options.write_text(f"disable_overlap_scheduler: {disabled}\n")
    config = load_llm_config("m", {}, options)
    hardware = Hardware(device="cuda", num_cores=4)
    settings = engine_settings(config, Path("m"), hardware, incarnation="me", secret=None)
    assert settings.overlap is not disabled
    assert settings.device == "cuda" and settings.max_batch_size == 2048


@pytest.mark.parametrize(
    ("text", "kv_dtype", "quantize"),
    [
        ("{}", "auto", False),
        ("kv_cache_config: {dtype: fp8}", "fp8", False),
        ("quant_config: {quant_algo: FP8}", "auto", True),
        ("quant_config: {quant_algo: null, kv_cache_quant_algo: FP8}", "fp8", False),
        ("quant_config:", "auto", False),
    ],
)
def test_precision(tmp_path, text, kv_dtype, quantize):
    options = tmp_path / "options.yaml"
    options.write_text(text)
    config = load_llm_config("m", {}, options)
    hardware = Hardware(device="cuda", num_cores=4)
    settings = engine_settings(config, Path("m"), hardware, incarnation="me", secret=None)
    assert (settings.kv_dtype, settings.quantize) == (kv_dtype, quantize)


def test_a_quantization_that_is_not_there_is_named(tmp_path):
    options = tmp_path / "options.yaml"
    options.write_text("quant_config: {quant_algo: NVFP4}")
    with pytest.raises(ConfigError, match=r"quant_config\.quant_algo.*NVFP4"):
        load_llm_config("m", {}, options)
