"""The registry that a router keeps by itself, for meshes without etcd.

Workers announce themselves over HTTP and repeat that as their heartbeat: every announcement carries all facts,
so a router that was restarted knows them again after one. A worker that is silent for `inactive_timeout_s`
is gone. This side knows nothing of HTTP; the other one is embedded_client.py.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from diptych.discovery import Snapshot
from diptych.errors import ConfigError
from diptych.wire import WorkerInfo

_MAX_WITHDRAWN = 1000
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    info: WorkerInfo
    expires: float


class EmbeddedRegistry:
    def __init__(
        self,
        *,
        heartbeat_interval_s: float = 5.0,
        inactive_timeout_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.heartbeat_interval_s = heartbeat_interval_s
        self._inactive_timeout_s = inactive_timeout_s
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._withdrawn: OrderedDict[str, None] = OrderedDict()  # ids that must not come back
        self._changed = asyncio.Event()
        self._closed = False

    def announce(self, info: WorkerInfo) -> bool:
        """Also the heartbeat. False: somebody took this worker out, it should drain."""
        if info.worker_id in self._withdrawn:
            return False
        entry = self._entries.get(info.worker_id)
        if entry is not None and entry.info.incarnation != info.incarnation:
            raise ConfigError(f"The worker id {info.worker_id!r} is registered already by another process.")
        self._entries[info.worker_id] = _Entry(info, self._clock() + self._inactive_timeout_s)
        if entry is None or entry.info != info:
            self._wake()
        return True

    def withdraw(self, worker_id: str) -> bool:
        """Take a worker out for good; False when it is not known."""
        self._withdrawn[worker_id] = None
        while len(self._withdrawn) > _MAX_WITHDRAWN:
            self._withdrawn.popitem(last=False)
        known = self._entries.pop(worker_id, None) is not None
        if known:
            self._wake()
        return known

    def snapshot(self) -> Snapshot:
        self._expire()
        return tuple(self._entries[worker_id].info for worker_id in sorted(self._entries))

    async def register(self, info: WorkerInfo) -> "LocalLease":
        """For workers of this process."""
        self.announce(info)
        return LocalLease(self, info)

    async def watch(self) -> AsyncIterator[Snapshot]:
        while not self._closed:
            changed = self._changed
            yield self.snapshot()
            waiting = asyncio.ensure_future(changed.wait())
            try:
                while not waiting.done():
                    self._expire()
                    await asyncio.wait((waiting,), timeout=self._next_expiry_s())
            finally:
                waiting.cancel()

    async def close(self) -> None:
        self._closed = True
        self._wake()

    def _expire(self) -> None:
        now = self._clock()
        silent = [worker_id for worker_id, entry in self._entries.items() if entry.expires <= now]
        for worker_id in silent:
            _log.warning("worker %s was silent for %g s", worker_id, self._inactive_timeout_s)
            del self._entries[worker_id]
        if silent:
            self._wake()

    def _next_expiry_s(self) -> float | None:
        if not self._entries:
            return None
        return max(0.0, min(entry.expires for entry in self._entries.values()) - self._clock())

    def _wake(self) -> None:
        # A fresh event for each change: a watcher that is busy with one snapshot finds the old event set.
        self._changed.set()
        self._changed = asyncio.Event()


class LocalLease:
    """Repeats its announcement as a remote worker would."""

    def __init__(self, registry: EmbeddedRegistry, info: WorkerInfo) -> None:
        self.removed = asyncio.Event()
        self._registry = registry
        self._info = info
        self._task = asyncio.create_task(self._keep(), name=f"lease-{info.worker_id}")

    async def update(self, info: WorkerInfo) -> None:
        if info.worker_id != self._info.worker_id:
            raise ValueError(f"this lease is for {self._info.worker_id!r}, not {info.worker_id!r}")
        self._info = info
        self._announce()

    async def close(self) -> None:
        await self.stop()
        self._registry.withdraw(self._info.worker_id)

    async def stop(self) -> None:
        """Stop the heartbeats, and stay in the list until they are missed."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _keep(self) -> None:
        while not self.removed.is_set():
            await asyncio.sleep(self._registry.heartbeat_interval_s)
            self._announce()

    def _announce(self) -> None:
        if not self._registry.announce(self._info):
            self.removed.set()
