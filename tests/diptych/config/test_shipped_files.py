"""The files in configs/ are what users copy: all of them load, and without a warning."""

from pathlib import Path

import pytest

from diptych.config import load_disagg_config, load_llm_config, load_metadata_config
from diptych.launcher import members

CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.mark.parametrize("name", ["disagg_config.yaml", "kv_aware_routing.yaml", "two_by_two.yaml"])
def test_disaggregated(name: str, caplog: pytest.LogCaptureFixture):
    assert len(members(load_disagg_config(CONFIGS / name))) >= 2
    assert caplog.messages == []


@pytest.mark.parametrize("name", ["context.yaml", "generation.yaml"])
def test_workers(name: str, caplog: pytest.LogCaptureFixture):
    load_llm_config("m", None, CONFIGS / name)
    assert caplog.messages == []


def test_metadata(caplog: pytest.LogCaptureFixture):
    load_metadata_config(CONFIGS / "metadata_config.yaml")
    assert caplog.messages == []


def test_no_file_is_forgotten():
    tested = ["context", "disagg_config", "generation", "kv_aware_routing", "metadata_config", "two_by_two"]
    assert sorted(path.stem for path in CONFIGS.iterdir()) == tested
