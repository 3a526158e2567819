"""From a worker's options to what its engine is told."""

from pathlib import Path

import pytest

from diptych.config import Hardware, load_llm_config
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
