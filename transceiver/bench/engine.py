"""A KV pool with known bytes and transceivers over it: an engine without a model, for measuring.

Every 64-bit word of a pool is a function of its index, so that the other process knows what it should get.
"""

import threading
import time
from collections.abc import Sequence

import numpy as np

from diptych.kv_layout import KvLayout
from diptych.transceiver.pool import KvPool
from diptych.transceiver.pool_memory import PoolMemory
from diptych.transceiver.settings import FetchDone, LeaseEnded, TransceiverSettings
from diptych.transceiver.transceiver import Transceiver

PATIENCE_S = 60.0
_CHUNK_WORDS = 1 << 24


def word_at(index: np.ndarray) -> np.ndarray:
    """What word number `index` of every owner's pool holds."""
    words: np.ndarray = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(0x5DEECE66D)
    return words


def make_pool(layout: KvLayout, num_blocks: int, incarnation: str, device: str) -> KvPool:
    if device == "cpu":
        return PoolMemory.create(layout, num_blocks, incarnation)
    import torch

    from diptych.transceiver.device_pool import DevicePool

    return DevicePool.create(layout, num_blocks, incarnation, torch.device("cuda", 0))


def fill(memory: KvPool) -> None:
    num_words = memory.identity.num_blocks * memory.identity.block_bytes // 8
    for start in range(0, num_words, _CHUNK_WORDS):
        index = np.arange(start, min(start + _CHUNK_WORDS, num_words))
        write(memory, start * 8, word_at(index).view(np.uint8))


def write(memory: KvPool, offset: int, data: np.ndarray) -> None:
    if isinstance(memory, PoolMemory):
        memory.data[offset : offset + len(data)] = data
        return
    import torch

    from diptych.transceiver.device_pool import DevicePool

    assert isinstance(memory, DevicePool)
    memory.tensor.view(-1)[offset : offset + len(data)] = torch.from_numpy(data).to(memory.device)


def read(memory: KvPool, offset: int, num_bytes: int) -> np.ndarray:
    if isinstance(memory, PoolMemory):
        return memory.data[offset : offset + num_bytes]
    from diptych.transceiver.device_pool import DevicePool

    assert isinstance(memory, DevicePool)
    data: np.ndarray = memory.tensor.view(-1)[offset : offset + num_bytes].cpu().numpy()
    return data


class Engine:
    """One pool, and a transceiver for each set of settings that is asked for."""

    def __init__(self, layout: KvLayout, num_blocks: int, incarnation: str, device: str) -> None:
        self.layout = layout
        self.memory = make_pool(layout, num_blocks, incarnation, device)
        self._bell = threading.Event()
        self._transceivers: dict[TransceiverSettings, Transceiver] = {}

    def transceiver(self, settings: TransceiverSettings) -> Transceiver:
        if settings not in self._transceivers:
            self._transceivers[settings] = Transceiver(
                self.memory, self.layout, settings, wake=self._bell.set
            )
        return self._transceivers[settings]

    def offer(self, settings: TransceiverSettings, blocks: Sequence[int], num_tokens: int) -> bytes:
        transceiver = self.transceiver(settings)
        for event in transceiver.poll(time.monotonic()):
            assert isinstance(event, LeaseEnded)
        return transceiver.offer(blocks, num_tokens)[1]

    def reuse_all(self) -> None:
        """From now on no digest is remembered; older tickets are worthless."""
        self.memory.generations[:] += 1

    def fetch(self, settings: TransceiverSettings, ticket: bytes, destination: Sequence[int]) -> FetchDone:
        transceiver = self.transceiver(settings)
        transceiver.fetch(ticket, range(len(destination)), destination)
        limit = time.monotonic() + PATIENCE_S
        while True:
            self._bell.clear()
            for event in transceiver.poll(time.monotonic()):
                if isinstance(event, FetchDone):
                    return event
                raise RuntimeError(f"the fetch failed: {event}")
            if not self._bell.wait(limit - time.monotonic()):
                raise RuntimeError(f"no event within {PATIENCE_S:g} s")

    def close(self) -> None:
        for transceiver in self._transceivers.values():
            transceiver.close()
        self._transceivers.clear()
        self.memory.close()


def settings_of(transport: str, *, digest: bool, programs: int) -> TransceiverSettings:
    return TransceiverSettings(
        backends=(transport,),
        verify_digest=digest,
        measure_transports=False,
        copy_programs=programs,
        timeout_s=PATIENCE_S,
    )
