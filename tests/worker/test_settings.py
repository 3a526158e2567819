"""From a worker's options to what its engine is told."""

from pathlib import Path

import pytest

from diptych.config import Hardware, load_llm_config
from diptych.errors import ConfigError
from diptych.worker.settings import engine_settings


@pytest.fixture
def settings_of(tmp_path):
    def settings(text):
        options = tmp_path / "options.yaml"
        options.write_text(text)
        config = load_llm_config("m", {}, options)
        hardware = Hardware(device="cuda", num_cores=4)
        return engine_settings(config, Path("m"), hardware, incarnation="me", secret=None)

    return settings


@pytest.mark.parametrize("disabled", [False, True])
def test_the_overlap_scheduler_can_be_disabled(settings_of, disabled):
    settings = settings_of(f"disable_overlap_scheduler: {disabled}\n")
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
def test_precision(settings_of, text, kv_dtype, quantize):
    settings = settings_of(text)
    assert (settings.kv_dtype, settings.quantize) == (kv_dtype, quantize)


@pytest.mark.parametrize(
    ("text", "timeout_s"), [("{}", 30.0), ("cache_transceiver_config: {kv_transfer_timeout_ms: 90000}", 90.0)]
)
def test_a_fetch_outlasts_an_unrenewed_lease_only_when_the_user_says_so(settings_of, text, timeout_s):
    settings = settings_of(text)
    assert (settings.kv_transfer_timeout_s, settings.lease_s) == (timeout_s, 30.0)


def test_a_quantization_that_is_not_there_is_named(settings_of):
    with pytest.raises(ConfigError, match=r"quant_config\.quant_algo.*NVFP4"):
        settings_of("quant_config: {quant_algo: NVFP4}")
