"""A list from the configuration and a registry that changes, as one registry.

A worker of the list counts until the registry names its URL; from then on the registry alone speaks for it,
so that a worker that leaves the registry does not come back through the list.
"""

from collections.abc import AsyncIterator

from diptych.discovery import Lease, Registry, Snapshot
from diptych.discovery.address import parse_address
from diptych.discovery.static import StaticRegistry
from diptych.errors import ConfigError
from diptych.wire import WorkerInfo


class MergedRegistry:
    def __init__(self, listed: StaticRegistry, registry: Registry) -> None:
        self._listed = listed
        self.registry = registry

    async def register(self, info: WorkerInfo) -> Lease:
        return await self.registry.register(info)

    async def watch(self) -> AsyncIterator[Snapshot]:
        listed = self._listed.snapshot()
        if listed:
            yield listed  # now, also when the registry cannot be reached
        named: set[str] = set()
        async for snapshot in self.registry.watch():
            named.update(_place(info) for info in snapshot)
            yield (*(info for info in listed if _place(info) not in named), *snapshot)

    async def close(self) -> None:
        await self.registry.close()
        await self._listed.close()


def _place(info: WorkerInfo) -> str:
    """The same text for two spellings of one address."""
    try:
        address = parse_address(info.url)
    except ConfigError:
        return info.url
    return address.netloc.replace("localhost:", "127.0.0.1:")
