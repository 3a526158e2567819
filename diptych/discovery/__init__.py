"""Discovery: who serves, where, and in which state.

A registry is a list of `WorkerInfo` that workers write and routers read. It knows neither HTTP legs nor
whether a worker answers: that the router finds out by itself. Implementations: `static` (a list from the
configuration), `etcd`, `embedded` (kept by the router itself), and `merged` (several as one).
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from diptych.wire import WorkerInfo

Snapshot = tuple[WorkerInfo, ...]


class Lease(Protocol):
    """A worker's place in the registry, for as long as the lease lives.

    A registry that forgets the worker by accident (an outage, a restart) is told again, and again when it
    cannot be reached.
    """

    @property
    def removed(self) -> asyncio.Event:
        """Set when somebody took the worker out of the registry on purpose: it should drain."""

    async def update(self, info: WorkerInfo) -> None:
        """Replace what is announced, for example with another state. Does not wait for a slow registry."""

    async def close(self) -> None:
        """Leave the registry; closing twice is harmless."""


class Registry(Protocol):
    async def register(self, info: WorkerInfo) -> Lease:
        """Announce a worker; its `worker_id` must be new (ConfigError). An unreachable registry is no error."""

    def watch(self) -> AsyncIterator[Snapshot]:
        """The whole list now, and again after each change, for ever. Snapshots may be skipped, never mixed.

        A registry that cannot be reached yields nothing and goes on trying: readers keep the last snapshot.
        """

    async def close(self) -> None:
        """Let go of every resource; watchers end."""
