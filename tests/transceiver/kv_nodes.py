"""Engines without a model: pool memory with known bytes, a transceiver, and a bell that its wake rings."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from diptych.kv_layout import KvLayout
from diptych.transceiver import ticket as tickets
from diptych.transceiver.companions import NO_COMPANIONS, Companions
from diptych.transceiver.digest import LandedDigests
from diptych.transceiver.host_limits import HostLimits
from diptych.transceiver.packages import missing_package
from diptych.transceiver.pool import KvPool
from diptych.transceiver.pool_memory import PoolMemory
from diptych.transceiver.settings import FetchDone, FetchFailed, LeaseEnded, TransceiverSettings
from diptych.transceiver.transceiver import Transceiver

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=16, tokens_per_block=8, model="tiny")
# One block is 1 MiB: a fetch of 48 does not fit into the buffers of a socket.
WIDE = KvLayout(num_layers=4, num_kv_heads=4, head_dim=128, tokens_per_block=128, model="wide")
LAYOUTS = {"tiny": LAYOUT, "wide": WIDE}
PATIENCE_S = 15.0
HAS_GPU = Path("/dev/nvidiactl").exists()


class Way(str):
    """A transport's name, and where the pools of its test are."""

    device = "cpu"

    @classmethod
    def on_gpu(cls, name: str) -> "Way":
        way = cls(name)
        way.device = "cuda"
        return way


def needs_package(transport: str) -> pytest.MarkDecorator:
    missing, limits = missing_package(transport), HostLimits.read()
    if missing is None and transport == "nixl" and limits.ptrace_scope and not limits.may_trace:
        missing = "processes of this host may not read each other's memory"
    return pytest.mark.skipif(missing is not None, reason=f"no transport {transport} here: {missing}")


def make_pool(layout: KvLayout, num_blocks: int, incarnation: str, device: str) -> KvPool:
    if device == "cpu":
        return PoolMemory.create(layout, num_blocks, incarnation)
    import torch

    from diptych.transceiver.device_pool import DevicePool

    return DevicePool.create(layout, num_blocks, incarnation, torch.device("cuda", 0))


def fill(memory: KvPool, seed: int) -> None:
    num_words = memory.identity.num_blocks * memory.identity.block_bytes // 8
    words = np.random.default_rng(seed).integers(0, 2**64, num_words, np.uint64)
    blocks_of(memory)[:] = words.view(np.uint8).reshape(memory.identity.num_blocks, -1)


def blocks_of(memory: KvPool):
    """`[num_blocks, block_bytes]`, to be read and written as a numpy array wherever it is."""
    return memory.blocks if isinstance(memory, PoolMemory) else DeviceBlocks(memory.tensor)


class DeviceBlocks:
    def __init__(self, tensor) -> None:
        self._tensor = tensor

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self._tensor.cpu().numpy()

    def __getitem__(self, key):
        return np.asarray(self)[key]

    def __setitem__(self, key, value) -> None:
        import torch

        blocks = np.asarray(self)
        blocks[key] = value
        self._tensor.copy_(torch.from_numpy(blocks))
        torch.cuda.synchronize()


class Node:
    """One engine, in this process."""

    def __init__(
        self,
        layout: KvLayout = LAYOUT,
        num_blocks: int = 32,
        *,
        seed: int = 0,
        clock=time.monotonic,
        companions: Companions = NO_COMPANIONS,
        **settings,
    ):
        devices = {way.device for way in settings.get("backends", ()) if isinstance(way, Way)} or {"cpu"}
        self.memory = make_pool(
            layout, num_blocks, f"incarnation-{seed}-{os.urandom(4).hex()}", devices.pop()
        )
        fill(self.memory, seed)
        self._bell = threading.Event()
        self._clock = clock
        self.layout = layout
        self.seen: list = []
        settings.setdefault("measure_transports", False)
        self.transceiver = Transceiver(
            self.memory,
            layout,
            TransceiverSettings(**settings),
            wake=self._bell.set,
            companions=companions,
            clock=clock,
        )

    @property
    def blocks(self):
        return blocks_of(self.memory)

    def offer(self, blocks: list[int]) -> tuple[str, bytes]:
        return self.transceiver.offer(blocks, len(blocks) * self.layout.tokens_per_block)

    def wait(self, wanted: Callable[[object], bool], patience_s: float = PATIENCE_S):
        """The first event that is wanted, past ones included; others are kept."""
        limit = time.monotonic() + patience_s
        while True:
            self._bell.clear()
            self.seen += self.transceiver.poll(self._clock())
            for i, event in enumerate(self.seen):
                if wanted(event):
                    return self.seen.pop(i)
            left = limit - time.monotonic()
            assert left > 0, f"no such event within {patience_s} s, only {self.seen}"
            self._bell.wait(left)

    def result(self, fetch_id: int, patience_s: float = PATIENCE_S) -> FetchDone | FetchFailed:
        return self.wait(lambda e: not isinstance(e, LeaseEnded) and e.fetch_id == fetch_id, patience_s)

    def ended(self, ticket_id: str, patience_s: float = PATIENCE_S) -> LeaseEnded:
        return self.wait(lambda e: isinstance(e, LeaseEnded) and e.ticket_id == ticket_id, patience_s)

    def close(self) -> None:
        self.transceiver.close()
        self.memory.close()


class Process:
    """An engine in a process of its own (engine_process.py), driven line by line."""

    def __init__(self, *args: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "engine_process.py"), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def tell(self, **command) -> None:
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def hear(self, key: str) -> dict:
        """The next line with that key; pytest's timeout bounds the wait."""
        for line in self._process.stdout:
            message = json.loads(line)
            if key in message:
                return message
        raise AssertionError(f"the process ended without {key!r}")

    def offer(self, blocks: list[int]) -> tuple[str, bytes]:
        self.tell(offer=blocks)
        answer = self.hear("ticket")
        return answer["ticket_id"], bytes.fromhex(answer["ticket"])

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait()
        if number == signal.SIGSTOP:
            os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class Gate:
    """Holds every fetch of this process after its first piece has landed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

        def hold() -> None:
            self.reached.set()
            assert self.open.wait(PATIENCE_S)

        for owner, name in landings():
            monkeypatch.setattr(owner, name, after(getattr(owner, name), hold))

    def wait(self) -> None:
        assert self.reached.wait(PATIENCE_S)


def landings() -> list[tuple[type, str]]:
    """The methods that are called when some bytes of a fetch have landed."""
    found: list[tuple[type, str]] = [(LandedDigests, "landed")]
    if HAS_GPU:
        from diptych.transceiver.cuda_ipc import CudaIpcTransfer
        from diptych.transceiver.device_staging import DeviceInlet
        from diptych.transceiver.nixl.transfer import NixlTransfer

        found += [(CudaIpcTransfer, "_settle"), (DeviceInlet, "put"), (NixlTransfer, "_land")]
    return found


def after(method: Callable[..., None], then: Callable[[], None]) -> Callable[..., None]:
    def both(*args) -> None:
        method(*args)
        then()

    return both


def forge(ticket: bytes, **changes) -> bytes:
    return tickets.encode(msgspec.structs.replace(tickets.decode(ticket), **changes))
