"""Each worker of a host sees GPUs of its own."""

from pathlib import Path

import pytest

from diptych.errors import ConfigError
from diptych.launcher.gpus import assign, visible_gpus


@pytest.mark.parametrize(
    ("sizes", "gpus", "expected"),
    [
        ({"ctx0": 2, "gen0": 1, "gen1": 1}, "0123", {"ctx0": "01", "gen0": "2", "gen1": "3"}),
        ({"ctx0": 1, "gen0": 2}, "01", {"ctx0": "0", "gen0": "01"}),
        ({"ctx0": 1, "gen0": 1}, "5", {"ctx0": "5", "gen0": "5"}),
        ({"ctx0": 0, "gen0": 1}, "0", {"ctx0": "", "gen0": "0"}),
    ],
    ids=["enough", "too few for all", "one for two", "a worker on the CPU"],
)
def test_workers_do_not_share_while_there_are_enough(sizes, gpus, expected):
    assert {name: "".join(names) for name, names in assign(sizes, list(gpus)).items()} == expected


def test_a_worker_that_needs_more_than_there_are():
    with pytest.raises(ConfigError, match="gen0 has tensor_parallel_size 4, and there are 2 GPUs"):
        assign({"ctx0": 1, "gen0": 4}, ["0", "1"])


@pytest.mark.parametrize(
    ("variable", "expected"),
    [("2,3", ["2", "3"]), ("", []), ("-1", []), ("GPU-8a, GPU-9b", ["GPU-8a", "GPU-9b"]), ("1,-1,0", ["1"])],
)
def test_the_variable_names_them(variable, expected):
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": variable}) == expected


def test_device_files_name_them_otherwise(tmp_path: Path):
    for name in ("nvidia10", "nvidia0", "nvidia2", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "2", "10"]
