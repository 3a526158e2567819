"""Sums over ranks through memory that the GPUs of one host address in each other: half of NCCL's time, and less.

Each rank adds up its share of the numbers and puts the sum into every rank's buffer (torch's symmetric memory, the
two-shot kernel). No multicast. May be captured in a CUDA graph; the order of the addends is the same on all ranks.
"""

import logging
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

log = logging.getLogger(__name__)

_SIZES = (2, 4, 8)  # numbers of ranks that the kernel is compiled for
_DTYPES = (torch.bfloat16, torch.float32)
_ALIGN = 16  # bytes that a thread takes at a time


class PeerSums:
    """`buffer` is `[bytes]` uint8 in memory that all ranks have mapped; sums lie in it until the next one begins."""

    def __init__(self, buffer: Tensor, num_ranks: int) -> None:
        self._buffer = buffer
        self._step = _ALIGN * num_ranks
        self._group = _group().group_name
        self._operations: Any = torch.ops.symm_mem

    @classmethod
    def open(cls, num_bytes: int, num_ranks: int, device: torch.device) -> "PeerSums | None":
        """For sums of up to so many bytes. None, on all ranks, when one of them cannot; the log says why."""
        sums, reason = None, ""
        try:
            sums = cls(_shared_memory(num_bytes, num_ranks, device), num_ranks)
        except (RuntimeError, ImportError, AttributeError) as error:
            reason = str(error).partition("\n")[0]
        usable = torch.tensor([sums is not None], dtype=torch.int32, device=device)
        dist.all_reduce(usable, dist.ReduceOp.MIN)
        if usable.item():
            return sums
        log.warning("sums over ranks go through NCCL, slower: %s", reason or "another rank cannot map memory")
        return None

    def total(self, parts: Tensor) -> Tensor | None:
        """`[S, ...]` of every rank to the sum of all, `[...]`, which the next call overwrites.

        None: not by this way.
        """
        padded = -(-parts[0].nbytes // self._step) * self._step
        if padded > len(self._buffer) or parts.dtype not in _DTYPES:
            return None
        flat = self._buffer[:padded].view(parts.dtype)
        result = flat[: parts[0].numel()].view(parts.shape[1:])
        if len(parts) == 1:
            result.copy_(parts[0])
        else:
            torch.sum(parts, 0, out=result)
        self._operations.two_shot_all_reduce_(flat, "sum", self._group)
        return result


def _shared_memory(num_bytes: int, num_ranks: int, device: torch.device) -> Tensor:
    if num_ranks not in _SIZES:
        raise RuntimeError(f"there are {num_ranks} ranks, and the kernel takes 2, 4 or 8")
    # Nothing here uses it, and setting it up takes something of all GPUs of the host.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    import torch.distributed._symmetric_memory as symmetric

    step = _ALIGN * num_ranks
    buffer = symmetric.empty(-(-num_bytes // step) * step, dtype=torch.uint8, device=device)
    symmetric.rendezvous(buffer, _group())
    return buffer


def _group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "the ranks have met"
    return group
