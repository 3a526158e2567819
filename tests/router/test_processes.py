"""Several processes on one port: replaced under load, restarted when they die, counted as one."""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import aiohttp
import pytest

from tests.fakes.ports import free_port
from tests.router.test_server import router_process, until_healthy

WHOLE = {"model": "fake", "prompt": "hello"}
STREAM = {**WHOLE, "stream": True}


def children(pid: int) -> set[int]:
    """Router processes; multiprocessing's resource tracker is none."""
    found = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.add(int(child))
    return found


async def until(condition) -> None:
    async def poll() -> None:
        while not condition():
            await asyncio.sleep(0.02)

    await asyncio.wait_for(poll(), 20)


@pytest.fixture
async def routers(context, generation):
    """Two processes; gives the supervisor and the port's URL."""
    port = free_port()
    async with router_process(context, generation, port=port, num_processes=2) as process:
        for _ in range(2):
            await asyncio.wait_for(process.stderr.readuntil(b"router listens on"), 20)
        drained = asyncio.create_task(process.stderr.read())  # a full pipe would stop it
        async with aiohttp.ClientSession() as session:
            await until_healthy(session, f"http://127.0.0.1:{port}")
        yield process, f"http://127.0.0.1:{port}"
        process.terminate()
        assert await asyncio.wait_for(process.wait(), 20) == 0
        await drained


async def metric(session: aiohttp.ClientSession, url: str, name: str) -> float:
    async with session.get(url + "/metrics") as response:
        lines = (await response.text()).splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(name + " "))


class Load:
    """Clients that ask without a pause, some on kept connections; every answer must be whole."""

    def __init__(self, url: str, stream_text: str) -> None:
        self._url = url
        self._stream_text = stream_text
        self._stop = False
        self.answers = 0
        self.failures: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self):
        self._tasks = [asyncio.create_task(self._ask(n)) for n in range(8)]
        await self.until_more(20)
        return self

    async def __aexit__(self, *_):
        self._stop = True
        await asyncio.gather(*self._tasks)

    async def until_more(self, count: int) -> None:
        wanted = self.answers + count
        await until(lambda: self.answers >= wanted or self.failures)

    async def _ask(self, number: int) -> None:
        connector = aiohttp.TCPConnector(force_close=number % 2 == 0)
        async with aiohttp.ClientSession(connector=connector) as session:
            while not self._stop:
                body = STREAM if number % 4 < 2 else WHOLE
                try:
                    async with session.post(self._url + "/v1/completions", json=body) as response:
                        text = await response.text()
                        if response.status != 200 or (body is STREAM and text != self._stream_text):
                            self.failures.append(f"{response.status}: {text}")
                except aiohttp.ClientError as error:
                    self.failures.append(repr(error))
                self.answers += 1


async def test_rolling_restart_under_load_shows_clients_nothing(routers, context, generation):
    process, url = routers
    before = children(process.pid)
    async with Load(url, context.event("one") + generation.events(skip=1)) as load:
        process.send_signal(signal.SIGUSR2)
        await until(lambda: load.failures or not before & children(process.pid))
        await load.until_more(50)
    assert load.failures == []
    assert len(children(process.pid)) == 2
    async with aiohttp.ClientSession() as session:
        asked = 0.0

        async def all_are_counted() -> None:  # within the second between two snapshots
            nonlocal asked
            while (asked := await metric(session, url, "total_requests_total")) != load.answers:
                await asyncio.sleep(0.05)

        try:
            await asyncio.wait_for(all_are_counted(), 10)
        except asyncio.TimeoutError:
            pytest.fail(f"{asked} requests are counted, {load.answers} were answered")


async def test_a_stream_outlives_the_process_that_accepted_it(routers, context, generation):
    process, url = routers
    before = children(process.pid)
    gate = generation.script.hold_after[2] = asyncio.Event()
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/completions", json=STREAM) as response,
    ):
        begun = await response.content.readuntil(b"\n\n")
        process.send_signal(signal.SIGUSR2)
        await until(lambda: len(children(process.pid) - before) == 2)
        gate.set()
        assert (begun + await response.content.read()).decode() == context.event("one") + generation.events(
            skip=1
        )
    await until(lambda: not before & children(process.pid))


async def test_a_process_that_dies_is_started_again(routers, context, generation):
    process, url = routers
    victim, survivor = children(process.pid)
    os.kill(victim, signal.SIGKILL)
    await until(lambda: len(children(process.pid)) == 2 and victim not in children(process.pid))
    assert survivor in children(process.pid)
    async with Load(
        url, context.event("one") + generation.events(skip=1)
    ) as load:  # connections that waited for it are served
        pass
    assert load.failures == []
