"""The follower against a worker's real feed on a real socket: in step, gaps, restarts, workers that tell nothing."""

import asyncio
import logging
from contextlib import AsyncExitStack

import aiohttp
import pytest
from aiohttp import web

from diptych import block_hash
from diptych.block_hash import pack_keys
from diptych.discovery.static import StaticRegistry
from diptych.errors import DiptychError
from diptych.router.pool import Pool
from diptych.router.prefix_follow import PrefixFollower
from diptych.router.prefix_index import PrefixIndex
from diptych.router.settings import Limits
from diptych.trust import ClusterTrust
from diptych.wire import BlockChanges, WorkerInfo
from diptych.worker.keys import SERVICE
from diptych.worker.kv_events import KvEventFeed
from diptych.worker.kv_routes import kv_cache_events, kv_events

QUICK = Limits(probe_s=2.0, probe_interval_s=0.05, probe_retry_s=0.02, probe_retry_max_s=0.05)


class Engine:
    """Tells what it is told to, once somebody listens."""

    def __init__(self) -> None:
        self.on_blocks = None
        self.blocks: set[int] = set()

    def watch_blocks(self, *, enabled: bool, with_tokens: bool = False) -> None:
        if enabled:
            self.on_blocks(BlockChanges(stored=pack_keys(self.blocks), reset=True))

    def change(self, stored=(), removed=()) -> None:
        self.blocks = (self.blocks - set(removed)) | set(stored)
        self.on_blocks(BlockChanges(stored=pack_keys(stored), removed=pack_keys(removed)))


class Worker:
    """The endpoints that a router asks, on a socket."""

    def __init__(self) -> None:
        self.port = 0
        self.algorithm = block_hash.ALGORITHM
        self.tells = True
        self.incarnation = "first"
        self.trust = ClusterTrust(None)

    async def start(self) -> None:
        self.engine = Engine()
        self.kv_events = KvEventFeed(self.engine, self.incarnation)
        app = web.Application(middlewares=[_errors])
        app[SERVICE] = self  # type: ignore[misc]
        app.add_routes([web.get("/server_info", self._info)])
        if self.tells:
            app.add_routes([web.get("/kv_events", kv_events), web.post("/kv_cache_events", kv_cache_events)])
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port).start()
        self.port = self.runner.addresses[0][1]

    async def stop(self) -> None:
        self.kv_events.close()
        await self.runner.cleanup()

    def check_ready(self) -> None:
        pass

    async def _info(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"incarnation": self.incarnation, "kv_cache_hash_algo": self.algorithm, "model": "m"}
        )


@web.middleware
async def _errors(request: web.Request, handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except DiptychError as error:
        return web.json_response(error.body(), status=error.status)


class Following:
    def __init__(self, worker: Worker, index: PrefixIndex, follower: PrefixFollower, pool: Pool) -> None:
        self.worker, self.index, self.follower, self.pool = worker, index, follower, pool

    def held(self) -> set[int]:
        return {key for key in range(100) if self.index.match("w", [key], 0.0)}

    async def until(self, condition) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.005)
        raise AssertionError(f"it did not happen; known: {self.held()}")


@pytest.fixture
async def follow():
    async with AsyncExitStack() as stack:

        async def start(**settings) -> Following:
            worker = Worker()
            for name, value in settings.items():
                setattr(worker, name, value)
            await worker.start()
            stack.push_async_callback(worker.stop)
            info = WorkerInfo(worker_id="w", url=f"http://127.0.0.1:{worker.port}", role="CONTEXT")
            pool = await stack.enter_async_context(Pool(StaticRegistry([info]), QUICK))
            index = PrefixIndex()
            follower = PrefixFollower(pool, index, lambda worker: worker.has_role("CONTEXT"))
            await stack.enter_async_context(follower)
            return Following(worker, index, follower, pool)

        yield start


async def test_the_index_follows(follow):
    mesh = await follow()
    await mesh.until(lambda: "w" in mesh.index.worker_ids)
    mesh.worker.engine.change([1, 2, 3])
    await mesh.until(lambda: mesh.held() == {1, 2, 3})
    mesh.worker.engine.change([4], [2])
    mesh.worker.engine.change([5], [3])
    await mesh.until(lambda: mesh.held() == {1, 4, 5})
    state = mesh.follower.followed["w"]
    assert state.is_current and state.resyncs == 1 and state.lag_s < 5


async def test_a_gap_is_healed_by_asking_for_everything(follow):
    mesh = await follow()
    mesh_index = mesh.index
    await mesh.until(lambda: "w" in mesh_index.worker_ids)
    mesh.worker.engine.change([1])
    await mesh.until(lambda: mesh.held() == {1})
    mesh_index._workers["w"].last -= 7  # as if answers were lost
    mesh.worker.engine.change([2], [1])
    await mesh.until(lambda: mesh.held() == {2})
    assert mesh.follower.followed["w"].resyncs == 2


async def test_what_is_gone_with_a_worker_and_back_with_the_next(follow):
    mesh = await follow()
    await mesh.until(lambda: "w" in mesh.index.worker_ids)
    mesh.worker.engine.change([1])
    await mesh.until(lambda: mesh.held() == {1})
    await mesh.worker.stop()
    await mesh.until(lambda: mesh.held() == set() and mesh.index.worker_ids == ())
    assert mesh.follower.followed == {}
    mesh.worker.incarnation = "second"
    await mesh.worker.start()
    await mesh.until(lambda: "w" in mesh.index.worker_ids)
    mesh.worker.engine.change([9])
    await mesh.until(lambda: mesh.held() == {9})


@pytest.mark.parametrize(
    "settings", [{"tells": False}, {"algorithm": "another"}], ids=["no events", "other hashes"]
)
async def test_a_worker_that_cannot_be_followed_is_named_once(follow, caplog, settings):
    with caplog.at_level(logging.WARNING):
        mesh = await follow(**settings)
        await mesh.until(lambda: bool(caplog.records))
    (message,) = [record.getMessage() for record in caplog.records]
    assert "only its load counts" in message and "worker w" in message
    assert mesh.index.worker_ids == ()


async def test_only_workers_that_a_policy_looks_at_are_asked(follow):
    mesh = await follow()
    await mesh.until(lambda: "w" in mesh.index.worker_ids)
    mesh.follower._concerns = lambda worker: False
    mesh.follower._adjust(mesh.follower._wanted(mesh.pool))
    assert mesh.index.worker_ids == () and mesh.follower.followed == {}


async def test_the_cache_is_told_to_the_cluster_only(follow):
    mesh = await follow(trust=ClusterTrust("secret"))
    async with aiohttp.ClientSession() as session:
        for method, path in (("GET", "/kv_events?wait_ms=0"), ("POST", "/kv_cache_events")):
            url = f"http://127.0.0.1:{mesh.worker.port}{path}"
            async with session.request(method, url) as response:
                assert response.status == 403
    assert mesh.index.worker_ids == ()
