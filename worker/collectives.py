"""What the ranks of one model tell each other inside a step: sums, parts of rows, drawn tokens.

Every rank must call the same ones in the same order. NCCL between GPUs, gloo between CPUs; on a GPU all of them may
be captured in a CUDA graph.
"""

import os
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from diptych.errors import StartupError
from diptych.worker.peer_sums import PeerSums

_MEETING = timedelta(seconds=120)  # until all ranks are at the same place
_OPERATION = timedelta(seconds=600)  # one rank may load weights for longer than another
# Partial sums of few rows are sent as they are: the kernel that takes them adds over one more axis at no cost.
_GATHER_BYTES = 64 << 10


# The newer of its two names, where torch has it: the older one warns there.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Collectives(Protocol):
    @property
    def rank(self) -> int: ...

    def reserve(self, num_bytes: int) -> None:
        """Before the first sum: the largest that is to be fast. All ranks say the same."""
        ...

    def total(self, x: Tensor) -> Tensor:
        """The sum over the ranks. `x` may be changed."""
        ...

    def total_parts(self, parts: Tensor) -> Tensor:
        """`[S, ...]` partial sums of this rank to `[P, ...]` ones of all, for whoever adds them up anyway.

        What it gives is valid until the next call.
        """
        ...

    def join_columns(self, x: Tensor) -> Tensor:
        """`[R, C]` of each rank to `[R, ranks * C]`, in the order of the ranks."""
        ...

    def from_first(self, x: Tensor) -> None:
        """Overwrite `x` with rank 0's."""
        ...


class Alone:
    """One rank has nobody to talk to."""

    rank = 0

    def reserve(self, num_bytes: int) -> None:
        pass

    def total(self, x: Tensor) -> Tensor:
        return x

    def total_parts(self, parts: Tensor) -> Tensor:
        return parts

    def join_columns(self, x: Tensor) -> Tensor:
        return x

    def from_first(self, x: Tensor) -> None:
        pass


ALONE = Alone()


class ProcessGroup:
    """Over torch.distributed's default group, of which a process has one."""

    def __init__(self, path: str, rank: int, size: int, device: torch.device) -> None:
        """Returns when all ranks are at this place (`open_store`). StartupError when that takes too long."""
        self.rank = rank
        self._size = size
        self._device = device
        self._peer_sums: PeerSums | None = None
        on_gpu = device.type == "cuda"
        # All ranks are on this host: no name of it need be resolved, no network card chosen.
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, "lo")
        try:
            store = FileStore(path, size)
            store.set_timeout(_MEETING)
            dist.init_process_group(
                "nccl" if on_gpu else "gloo",
                store=store,
                rank=rank,
                world_size=size,
                timeout=_OPERATION,
                device_id=device if on_gpu else None,
            )
        except (RuntimeError, ValueError) as error:
            raise StartupError(f"rank {rank} did not meet the {size - 1} others: {error}") from error

    def reserve(self, num_bytes: int) -> None:
        if self._device.type == "cuda":
            self._peer_sums = PeerSums.open(num_bytes, self._size, self._device)

    def total(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def total_parts(self, parts: Tensor) -> Tensor:
        total = None if self._peer_sums is None else self._peer_sums.total(parts)
        if total is not None:
            return total[None]
        if parts.numel() * parts.element_size() <= _GATHER_BYTES:
            return self._gather(parts).flatten(0, 1)
        return self.total(parts[0] if len(parts) == 1 else parts.sum(0))[None]

    def join_columns(self, x: Tensor) -> Tensor:
        return self._gather(x).transpose(0, 1).reshape(len(x), -1)

    def from_first(self, x: Tensor) -> None:
        dist.broadcast(x, 0)

    def _gather(self, x: Tensor) -> Tensor:
        """`[ranks, *x.shape]`"""
        gathered = x.new_empty((self._size * len(x), *x.shape[1:]))
        _all_gather(gathered, x.contiguous())
        return gathered.view(self._size, *x.shape)


def open_store() -> str:
    """The path of a new place where ranks find each other: memory of this process, open to its user's processes."""
    return f"/proc/{os.getpid()}/fd/{os.memfd_create('diptych-ranks')}"
