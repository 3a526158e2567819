"""Pinned host memory between a GPU's pool and a socket: two buffers, so that both sides work at the same time."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from diptych.transceiver.device_pool import DevicePool
from diptych.transceiver.plan import CopyPlan
from diptych.transceiver.pool import Bytes, DigestKind, Digests
from diptych.transceiver.spans import Int64s, batches
from diptych.transceiver.staging import BATCH_BYTES, MAX_SPANS, packed


class _Buffer:
    def __init__(self, num_bytes: int) -> None:
        self.tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self.bytes: Bytes = self.tensor.numpy()
        # Waiting for it sleeps instead of spinning.
        self.copied = torch.cuda.Event(blocking=True)


class DeviceOutlet:
    def __init__(self, pool: DevicePool) -> None:
        self._data: Tensor = pool.tensor.view(-1)
        self._stream = torch.cuda.Stream(pool.device)
        self._buffers = (_Buffer(BATCH_BYTES), _Buffer(BATCH_BYTES))

    def batches(self, offsets: Int64s, lengths: Int64s) -> Iterator[list[Bytes]]:
        parts = list(batches(lengths, BATCH_BYTES, MAX_SPANS))
        for number, part in enumerate(parts):
            if number == 0:
                self._load(0, offsets[part], lengths[part])
            if number + 1 < len(parts):  # the other buffer was sent before this one was asked for
                self._load(number + 1, offsets[parts[number + 1]], lengths[parts[number + 1]])
            buffer = self._buffers[number % 2]
            buffer.copied.synchronize()
            yield [buffer.bytes[where] for where in packed(lengths[part])]

    def _load(self, number: int, offsets: Int64s, lengths: Int64s) -> None:
        buffer = self._buffers[number % 2]
        with torch.cuda.device(self._data.device), torch.cuda.stream(self._stream):
            for start, where in zip(offsets.tolist(), packed(lengths), strict=True):
                there = self._data[start : start + where.stop - where.start]
                buffer.tensor[where].copy_(there, non_blocking=True)
            buffer.copied.record(self._stream)


class DeviceInlet:
    def __init__(self, pool: DevicePool) -> None:
        self._pool = pool
        self._data: Tensor = pool.tensor.view(-1)
        self._stream = torch.cuda.Stream(pool.device)
        size = max(BATCH_BYTES, pool.identity.block_bytes)
        self._buffers = (_Buffer(size), _Buffer(size))
        self._number = 0
        self._taken: tuple[list[int], list[slice]] = ([], [])

    def take(self, offsets: Int64s, lengths: Int64s) -> list[Bytes]:
        buffer = self._buffers[self._number % 2]
        buffer.copied.synchronize()
        self._taken = (offsets.tolist(), packed(lengths))
        return [buffer.bytes[where] for where in self._taken[1]]

    def put(self) -> None:
        buffer = self._buffers[self._number % 2]
        with torch.cuda.device(self._data.device), torch.cuda.stream(self._stream):
            for start, where in zip(*self._taken, strict=True):
                here = self._data[start : start + where.stop - where.start]
                here.copy_(buffer.tensor[where], non_blocking=True)
            buffer.copied.record(self._stream)
        self._number += 1

    def digests(self, plan: CopyPlan, digest_kind: DigestKind | None) -> bool:
        return digest_kind == self._pool.digest_kind and plan.whole_blocks

    def finish(self, plan: CopyPlan, digest_kind: DigestKind | None) -> Digests | None:
        self.settle()
        if not self.digests(plan, digest_kind):
            return None
        return np.array(self._pool.digest(plan.destination_blocks.tolist()), np.uint64)

    def settle(self) -> None:
        for buffer in self._buffers:
            buffer.copied.synchronize()
