"""The ranks of a model as threads of a test, with the collectives between them."""

import threading

import torch

from diptych.worker.parallel import ParallelDims

DEADLINE_S = 120


def ranks(size: int) -> list[ParallelDims]:
    return [ParallelDims(tp_size=size, tp_rank=rank) for rank in range(size)]


class Threads:
    """Collectives between the threads of a test."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=DEADLINE_S)
        self.values: list[torch.Tensor] = [torch.empty(0)] * size

    def of(self, rank: int) -> "ThreadRank":
        return ThreadRank(self, rank)


class ThreadRank:
    def __init__(self, threads: Threads, rank: int) -> None:
        self._threads = threads
        self.rank = rank

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._threads.values[self.rank] = x.clone()
        self._threads.barrier.wait()
        values = list(self._threads.values)
        self._threads.barrier.wait()
        return values

    def reserve(self, num_bytes):
        pass

    def total(self, x):
        return sum(self._exchange(x))

    def total_parts(self, parts):
        return torch.cat(self._exchange(parts))

    def join_columns(self, x):
        return torch.cat(self._exchange(x), dim=1)

    def from_first(self, x):
        x.copy_(self._exchange(x)[0])
