"""Fixtures of the router's tests: fake workers, and a router in front of them, all on loopback sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import pytest

from diptych.config.routing import ConditionalDisagg
from diptych.discovery import Registry
from diptych.discovery.static import StaticRegistry
from diptych.listen import open_listener
from diptych.router.router import Router as RouterProcess
from diptych.router.settings import Limits
from diptych.router.status import missing_roles
from tests.fakes.fake_worker import FakeWorker, Leg

STREAM = {"model": "fake", "prompt": "hello", "stream": True}
WHOLE = {"model": "fake", "prompt": "hello"}
FULL = {"error": {"message": "full", "type": "rate_limit_error", "param": None, "code": "overloaded"}}


@dataclass(frozen=True)
class Policy:
    type: str = "round_robin"
    options: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    router: Policy = field(default_factory=Policy)


@dataclass(frozen=True)
class Config:
    hostname: str = "127.0.0.1"
    port: int = 0
    context_servers: Section = field(default_factory=Section)
    generation_servers: Section = field(default_factory=Section)
    model: str | None = None
    conditional_disagg_config: ConditionalDisagg | None = None
    schedule_style: str = "context_first"
    max_retries: int = 1
    request_timeout_s: float = 20.0
    server_start_timeout_s: float = 20.0
    max_body_bytes: int = 100_000
    server_keep_alive_timeout: float = 10.0
    num_workers: int = 1
    log_level: str = "info"
    minimal_instances: Any = None
    cluster_secret: str | None = None
    max_concurrent_requests: int | None = None
    max_queued_requests: int | None = None
    api_keys: tuple = ()


FAST = Limits(connect_s=2.0, probe_s=2.0, probe_retry_s=0.05, probe_retry_max_s=0.1, shutdown_s=1.0)


class Router:
    """A running router and a client session for it."""

    def __init__(self, url: str, process: RouterProcess, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.pool = process.pool
        self.admission = process.admission
        self.session = session

    def post(self, body: object, *, path: str = "/v1/completions", **options):
        return self.session.post(self.url + path, json=body, **options)

    async def text(self, body: object, **options) -> str:
        async with self.post(body, **options) as response:
            assert response.status == 200, await response.text()
            return await response.text()

    async def held(self, body: object, worker: FakeWorker, leg: Leg) -> "asyncio.Task[str]":
        """A client's request that this worker holds up in this leg, until `script.hold[leg]` is set."""
        worker.script.hold[leg] = asyncio.Event()
        request = asyncio.create_task(self.text(body))
        await worker.wait_for(lambda: worker.legs(leg))
        return request

    @asynccontextmanager
    async def streaming(self, num_events: int, **options) -> AsyncIterator[aiohttp.ClientResponse]:
        """A client that has read so many events of its stream."""
        async with self.post(STREAM, **options) as response:
            for _ in range(num_events):
                await response.content.readuntil(b"\n\n")
            yield response

    async def metric(self, name: str) -> float:
        async with self.session.get(self.url + "/metrics") as response:
            for line in (await response.text()).splitlines():
                if line.startswith(name + " "):
                    return float(line.split()[1])
        raise AssertionError(f"there is no metric {name}")

    async def until(self, condition: Callable[[], bool]) -> None:
        """Let the loop run until something shows that nobody announces."""
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.005)
        raise AssertionError("it did not happen")


StartRouter = Callable[..., Awaitable[Router]]


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    """Ends with the assertion that no task outlives what it belonged to."""
    before = asyncio.all_tasks()
    async with AsyncExitStack() as stack:
        yield stack
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    if left:
        _, left = await asyncio.wait(left, timeout=2.0)
    assert not left, f"tasks are left: {left}"


@pytest.fixture
async def start_router(stack: AsyncExitStack) -> StartRouter:
    async def start(
        *workers: FakeWorker,
        config: Config | None = None,
        limits: Limits = FAST,
        registry: Registry | None = None,
        wait_ready: bool = True,
    ) -> Router:
        registry = registry or StaticRegistry.from_urls(
            [w.url for w in workers if w.role == "CONTEXT"],
            [w.url for w in workers if w.role == "GENERATION"],
        )
        router = RouterProcess(config or Config(), registry, limits=limits)
        await stack.enter_async_context(router)
        listener = open_listener("127.0.0.1", 0)
        host, port = listener.getsockname()
        await router.listen(listener)
        session = await stack.enter_async_context(aiohttp.ClientSession())
        pool = router.pool
        if wait_ready:
            ready = await pool.wait_until(lambda pool: not missing_roles(pool), 5.0)
            assert ready
            known = await pool.wait_until(lambda pool: all(w.probed for w in pool.workers), 5.0)
            assert known
        return Router(f"http://{host}:{port}", router, session)

    return start


@pytest.fixture
async def context(stack: AsyncExitStack) -> FakeWorker:
    return await stack.enter_async_context(FakeWorker("c0", role="CONTEXT"))


@pytest.fixture
async def generation(stack: AsyncExitStack) -> FakeWorker:
    return await stack.enter_async_context(FakeWorker("g0", role="GENERATION"))


@pytest.fixture
async def spare_context(stack: AsyncExitStack) -> FakeWorker:
    return await stack.enter_async_context(FakeWorker("c1", role="CONTEXT"))


@pytest.fixture
async def spare_generation(stack: AsyncExitStack) -> FakeWorker:
    return await stack.enter_async_context(FakeWorker("g1", role="GENERATION"))


def last_event(text: str) -> dict:
    """The error event before the end of a failed stream."""
    assert text.endswith("\n\ndata: [DONE]\n\n")
    return json.loads(text.split("\n\n")[-3].removeprefix("data: "))


async def no_connections(router) -> None:
    """Every upstream connection is either idle or closed."""
    for worker in router.pool.workers:
        for _ in range(100):
            if all(connection.exchange is None for connection in worker.client.connections):
                break
            await asyncio.sleep(0)
        assert all(connection.exchange is None for connection in worker.client.connections)
        assert worker.in_flight == 0
