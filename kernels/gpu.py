"""What a device is, and how the kernels of a step follow each other on it."""

import functools
import sys
from typing import Any

import torch

_HOPPER = (9, 0)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """1 for a CPU, on which Triton's interpreter runs one program at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have; no limit in the interpreter."""
    if device.type != "cuda":
        return sys.maxsize
    properties: Any = torch.cuda.get_device_properties(device)  # its declared type lacks the field
    return int(properties.shared_memory_per_block_optin)


@functools.cache
def chained(device: torch.device) -> dict[str, Any]:
    """Launch options of a kernel that starts with `dependent_launch_triton.follow`."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= _HOPPER:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}
