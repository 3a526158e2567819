"""A registry that lives in this process: the list of workers that the configuration gives.

Workers of the same process (tests, embedded use) may register as well; watchers then see the change.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable

from diptych.discovery import Snapshot
from diptych.discovery.address import parse_address
from diptych.errors import ConfigError
from diptych.wire import Role, WorkerInfo


class StaticRegistry:
    def __init__(self, workers: Iterable[WorkerInfo] = ()) -> None:
        self._workers: dict[str, WorkerInfo] = {}
        for info in workers:
            self._add(info)
        self._changed = asyncio.Event()
        self._closed = False

    @classmethod
    def from_urls(cls, context_urls: Iterable[str], generation_urls: Iterable[str]) -> "StaticRegistry":
        """Workers named by their URL. One that is in both lists serves both roles."""
        roles: dict[str, Role] = {parse_address(text).url: "CONTEXT" for text in context_urls}
        for text in generation_urls:
            url = parse_address(text).url
            roles[url] = "BOTH" if roles.get(url) in ("CONTEXT", "BOTH") else "GENERATION"
        return cls(WorkerInfo(worker_id=url, url=url, role=role) for url, role in roles.items())

    async def register(self, info: WorkerInfo) -> "StaticLease":
        self._add(info)
        self._wake()
        return StaticLease(self, info.worker_id)

    async def watch(self) -> AsyncIterator[Snapshot]:
        while not self._closed:
            changed = self._changed
            yield self.snapshot()
            await changed.wait()

    async def close(self) -> None:
        self._closed = True
        self._wake()

    def snapshot(self) -> Snapshot:
        return tuple(self._workers.values())

    def replace(self, info: WorkerInfo) -> None:
        """Announce a registered worker's new facts; one that has left stays away."""
        if info.worker_id in self._workers:
            self._workers[info.worker_id] = info
            self._wake()

    def remove(self, worker_id: str) -> None:
        if self._workers.pop(worker_id, None) is not None:
            self._wake()

    def _add(self, info: WorkerInfo) -> None:
        if info.worker_id in self._workers:
            raise ConfigError(f"The worker id {info.worker_id!r} is registered already; ids must be unique.")
        self._workers[info.worker_id] = info

    def _wake(self) -> None:
        # A fresh event for each change: a watcher that is busy with one snapshot finds the old event set.
        self._changed.set()
        self._changed = asyncio.Event()


class StaticLease:
    def __init__(self, registry: StaticRegistry, worker_id: str) -> None:
        self._registry = registry
        self._worker_id = worker_id
        self.removed = asyncio.Event()  # stays clear: nobody else can reach this list

    async def update(self, info: WorkerInfo) -> None:
        if info.worker_id != self._worker_id:
            raise ValueError(f"this lease is for {self._worker_id!r}, not {info.worker_id!r}")
        self._registry.replace(info)

    async def close(self) -> None:
        self._registry.remove(self._worker_id)
