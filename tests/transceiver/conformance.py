"""What the conformance suite needs beside engines: every transport there is, owners in other processes, footprints.

The suite is test_copies, test_refusals, test_aborts, test_dead_peers and test_lifetimes: every transport does the same.
"""

import gc
import json
import os
import threading
import time

import numpy as np
import pytest
from kv_nodes import HAS_GPU, Process, Way, needs_package

from diptych.kv_layout import KvLayout

ONE_SIDED = ("shm", "cuda_ipc")  # the owner's process takes no part at all
WAYS = [
    Way("shm"),
    Way("tcp"),
    *(pytest.param(Way(name), id=name, marks=needs_package(name)) for name in ("nixl", "ucx")),
    *(
        pytest.param(
            Way.on_gpu(name),
            id=f"{name} on a GPU",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not HAS_GPU, reason="there is no GPU"),
                needs_package(name),
            ],
        )
        for name in ("cuda_ipc", "tcp", "nixl", "ucx")
    ),
]


def owner_process(
    processes, transport: str, layout: str = "wide", num_blocks: int = 48, **options
) -> Process:
    settings = {"backends": [transport], "measure_transports": False, "device": transport.device, **options}
    return processes(layout, str(num_blocks), "7", json.dumps(settings))


def bytes_of(layout: KvLayout, num_blocks: int, seed: int) -> np.ndarray:
    words = np.random.default_rng(seed).integers(0, 2**64, num_blocks * layout.block_bytes // 8, np.uint64)
    return words.view(np.uint8).reshape(num_blocks, layout.block_bytes)


def footprint() -> tuple[int, ...]:
    with open("/proc/self/maps") as maps:
        mapped = sum("memfd:diptych" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), threading.active_count(), mapped


def collected_footprint() -> tuple[int, ...]:
    """Without what failures of earlier tests still hold."""
    gc.collect()
    return footprint()


def wait_until(condition, complaint: str) -> None:
    limit = time.monotonic() + 5
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < limit, f"{complaint}; now {footprint()}"
        pause.wait(0.01)
