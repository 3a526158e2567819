"""Limits of other hosts, written into a folder: which of them a worker warns of, and what it says."""

from dataclasses import replace
from pathlib import Path

import pytest

from diptych.transceiver.host_limits import HostLimits

GIB = 2**30
FINE = HostLimits(
    locked_bytes=None,
    open_files=65536,
    shm_free_bytes=8 * GIB,
    ptrace_scope=0,
    may_trace=False,
    memory_bytes=None,
    rdma_devices=(),
)
BOTH = ("shm", "nixl", "ucx", "tcp")


@pytest.mark.parametrize(
    ("changes", "transports", "reason", "remedy"),
    [
        ({"shm_free_bytes": 64 << 20}, BOTH, "/dev/shm has 64 MiB left, nixl and ucx", "--shm-size"),
        ({"ptrace_scope": 1}, BOTH, "ptrace_scope is 1", "--cap-add=SYS_PTRACE"),
        (
            {"rdma_devices": ("mlx5_0",), "locked_bytes": 64 << 10},
            BOTH,
            "must lock the KV pool's 1024 MiB",
            "--ulimit memlock=-1",
        ),
        (
            {"rdma_devices": ("mlx5_0",)},
            ("shm", "tcp"),
            "RDMA (mlx5_0), but KV",
            "",
        ),
        ({"open_files": 256}, ("shm", "tcp"), "256 open files", "ulimit -n"),
        ({"memory_bytes": GIB}, ("shm",), "this container may use 1024 MiB", "kv_cache_config.max_tokens"),
    ],
)
def test_what_keeps_kv_off_a_fast_path_has_a_reason_and_a_remedy(changes, transports, reason, remedy):
    [concern] = replace(FINE, **changes).concerns(transports, GIB)
    assert reason in concern.reason
    assert remedy in concern.remedy


@pytest.mark.parametrize(
    ("changes", "transports"),
    [
        ({}, BOTH),
        ({"ptrace_scope": 1, "may_trace": True}, BOTH),
        ({"ptrace_scope": 1, "shm_free_bytes": 0, "locked_bytes": 0}, ("shm", "tcp")),  # ours need none of it
        ({"rdma_devices": ("mlx5_0",), "locked_bytes": 2 * GIB}, BOTH),
        ({"memory_bytes": 2 * GIB}, ("shm", "tcp")),
        ({"shm_free_bytes": None, "open_files": None}, BOTH),
    ],
)
def test_no_warning_without_a_cause(changes, transports):
    assert list(replace(FINE, **changes).concerns(transports, GIB)) == []


def test_a_host_is_read(tmp_path: Path):
    for name, text in {
        "proc/sys/kernel/yama/ptrace_scope": "1\n",
        "proc/self/status": "Name:\tx\nCapEff:\t0000000000080000\n",
        "sys/fs/cgroup/memory.max": "1073741824\n",
        "sys/class/infiniband/mlx5_0/x": "",
        "dev/shm/x": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    host = HostLimits.read(tmp_path)
    assert (host.ptrace_scope, host.may_trace, host.memory_bytes) == (1, True, GIB)
    assert host.rdma_devices == ("mlx5_0",)
    assert host.shm_free_bytes > 0


def test_a_host_that_shows_nothing(tmp_path: Path):
    host = HostLimits.read(tmp_path)
    assert (host.ptrace_scope, host.may_trace, host.memory_bytes) == (0, False, None)
    assert (host.rdma_devices, host.shm_free_bytes) == ((), None)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert HostLimits.read(tmp_path).memory_bytes is None
