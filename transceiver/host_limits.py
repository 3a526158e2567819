"""Limits of this host that keep KV off a fast path, or a pool from existing: what the worker's log warns of.

Everything is read from files under `root`, so that a test can write another host. Knows what transports need,
not how they work.
"""

import os
import resource
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from diptych.transceiver import packages

_FOREIGN = frozenset(packages.OPTIONAL)
_SHM_BYTES = 256 << 20
_OPEN_FILES = 1024
_CAP_SYS_PTRACE = 19


@dataclass(frozen=True, slots=True)
class Concern:
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.reason}; to mend it, {self.remedy}"


@dataclass(frozen=True, slots=True)
class HostLimits:
    """Bytes and numbers; None: no limit, or there is no such thing here."""

    locked_bytes: int | None
    open_files: int | None
    shm_free_bytes: int | None
    ptrace_scope: int
    may_trace: bool
    memory_bytes: int | None  # of the container
    rdma_devices: tuple[str, ...]

    @classmethod
    def read(cls, root: Path = Path("/")) -> "HostLimits":
        return cls(
            locked_bytes=_soft(resource.RLIMIT_MEMLOCK),
            open_files=_soft(resource.RLIMIT_NOFILE),
            shm_free_bytes=_free(root / "dev/shm"),
            ptrace_scope=_number(root / "proc/sys/kernel/yama/ptrace_scope") or 0,
            may_trace=_has_capability(root / "proc/self/status", _CAP_SYS_PTRACE),
            memory_bytes=_number(root / "sys/fs/cgroup/memory.max"),
            rdma_devices=_names(root / "sys/class/infiniband"),
        )

    def concerns(self, transports: Collection[str], pool_bytes: int) -> Iterator[Concern]:
        """Of a worker with these transports and a KV pool of this size in host memory."""
        foreign = sorted(_FOREIGN.intersection(transports))
        names = " and ".join(foreign)
        if self.rdma_devices and not foreign:
            yield Concern(
                f"this host has RDMA ({', '.join(self.rdma_devices)}), but KV to other hosts goes over TCP",
                packages.missing_package("nixl") or "let cache_transceiver_config.backend be DEFAULT or NIXL",
            )
        if foreign and self.ptrace_scope and not self.may_trace:
            yield Concern(
                f"{names} cannot copy between processes of this host: kernel.yama.ptrace_scope is "
                f"{self.ptrace_scope}",
                "set it to 0, or give workers CAP_SYS_PTRACE (docker: --cap-add=SYS_PTRACE)",
            )
        if foreign and self.shm_free_bytes is not None and self.shm_free_bytes < _SHM_BYTES:
            yield Concern(
                f"/dev/shm has {_mib(self.shm_free_bytes)} left, {names} may need {_mib(_SHM_BYTES)}",
                "enlarge it (docker: --shm-size=1g or --ipc=host)",
            )
        if foreign and self.rdma_devices and self.locked_bytes is not None and self.locked_bytes < pool_bytes:
            yield Concern(
                f"{names} must lock the KV pool's {_mib(pool_bytes)} for RDMA, the limit is "
                f"{_mib(self.locked_bytes)}",
                "raise it (ulimit -l unlimited; docker: --ulimit memlock=-1)",
            )
        if self.open_files is not None and self.open_files < _OPEN_FILES:
            yield Concern(
                f"{self.open_files} open files are allowed: clients and KV peers need one each",
                f"allow {_OPEN_FILES} or more (ulimit -n)",
            )
        if self.memory_bytes is not None and self.memory_bytes <= pool_bytes:
            yield Concern(
                f"the KV pool takes {_mib(pool_bytes)}, this container may use {_mib(self.memory_bytes)} in all",
                "lower kv_cache_config.max_tokens or raise the container's memory limit",
            )


def _soft(name: int) -> int | None:
    soft = resource.getrlimit(name)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def _free(path: Path) -> int | None:
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None


def _names(path: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in path.iterdir())) if path.is_dir() else ()


def _has_capability(status: Path, number: int) -> bool:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return False
    effective = next((line.split()[1] for line in lines if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) >> number & 1)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"
