"""Which device a worker takes, from what the machine shows without torch."""

import pytest

from diptych.config import LlmConfig
from diptych.errors import ConfigError
from diptych.worker import hardware


@pytest.fixture
def machine(monkeypatch, tmp_path):
    def make(*, driver: bool, visible: str | None = None) -> None:
        path = tmp_path / "nvidiactl"
        if driver:
            path.touch()
        monkeypatch.setattr(hardware, "_DRIVER", path)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return make


@pytest.mark.parametrize(
    ("driver", "visible", "asked", "device"),
    [
        (True, None, "auto", "cuda"),
        (True, "1", "auto", "cuda"),
        (True, "", "auto", "cpu"),
        (True, "-1", "auto", "cpu"),
        (True, None, "cpu", "cpu"),
        (False, None, "auto", "cpu"),
        (True, "3", "cuda", "cuda"),
    ],
)
def test_the_device_that_is_taken(machine, driver, visible, asked, device):
    machine(driver=driver, visible=visible)
    assert hardware.detect(LlmConfig(model="m", device=asked)).device == device


@pytest.mark.parametrize(("driver", "visible"), [(False, None), (True, "")])
def test_a_gpu_that_is_not_there_is_refused(machine, driver, visible):
    machine(driver=driver, visible=visible)
    with pytest.raises(ConfigError, match="device is cuda, but"):
        hardware.detect(LlmConfig(model="m", device="cuda"))
