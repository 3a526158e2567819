"""This host's limits, and what they mean for a worker."""

import os
from collections.abc import Collection, Iterator

from diptych.transceiver.doctor.finding import Finding
from diptych.transceiver.host_limits import HostLimits

_GIB = 2**30


def limits(host: HostLimits, transports: Collection[str], pool_bytes: int) -> Iterator[Finding]:
    """`pool_bytes`: of the KV pool that a worker would have."""
    shown = {
        "memory": f"{_free_memory() / _GIB:.1f} GiB free; a KV pool takes {pool_bytes / _GIB:.2f} GiB",
        "locked memory": _size(host.locked_bytes),
        "/dev/shm": "none"
        if host.shm_free_bytes is None
        else f"{_size(host.shm_free_bytes)} free; pools are not there",
        "open files": "unlimited" if host.open_files is None else str(host.open_files),
        "ptrace scope": f"{host.ptrace_scope}{', with CAP_SYS_PTRACE' if host.may_trace else ''}",
        "pid namespace": os.readlink("/proc/self/ns/pid"),
        "RDMA": ", ".join(host.rdma_devices) or "none",
    }
    for name, detail in shown.items():
        yield Finding(section="limits", name=name, detail=detail)
    for concern in host.concerns(transports, pool_bytes):
        yield Finding(section="limits", name="", status="warns", detail=concern.reason, remedy=concern.remedy)


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _size(num_bytes: int | None) -> str:
    return "unlimited" if num_bytes is None else f"{num_bytes / 2**20:.0f} MiB"
