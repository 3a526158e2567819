"""Router processes: start, graceful stop, several on one port."""

import asyncio
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import pytest

from tests.fakes.ports import free_port

STREAM = {"model": "fake", "prompt": "hello", "stream": True}


@asynccontextmanager
async def router_process(
    context, generation, *, port: int, num_processes: int = 1
) -> AsyncIterator[asyncio.subprocess.Process]:
    arguments = ("-m", "tests.router.route", str(port), str(num_processes), context.url, generation.url)
    process = await asyncio.create_subprocess_exec(sys.executable, *arguments, stderr=asyncio.subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_healthy(session: aiohttp.ClientSession, url: str) -> None:
    async def ask() -> None:
        while True:
            try:
                async with session.get(url + "/health") as response:
                    if response.status == 200:
                        return
            except aiohttp.ClientConnectorError:
                pass
            await asyncio.sleep(0.05)

    await asyncio.wait_for(ask(), 20)


@pytest.mark.parametrize("num_processes", [1, 2])
async def test_sigterm_lets_running_requests_end(context, generation, num_processes):
    gate = generation.script.hold_after[2] = asyncio.Event()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    async with (
        router_process(context, generation, port=port, num_processes=num_processes) as process,
        aiohttp.ClientSession() as session,
    ):
        await until_healthy(session, url)
        async with session.post(url + "/v1/completions", json=STREAM) as response:
            await response.content.readuntil(b"\n\n")
            process.send_signal(signal.SIGTERM)

            async def refused() -> None:
                while True:
                    try:
                        _, writer = await asyncio.open_connection("127.0.0.1", port)
                        writer.close()
                    except (ConnectionRefusedError, ConnectionResetError):
                        return
                    await asyncio.sleep(0.02)

            await asyncio.wait_for(refused(), 10)
            assert process.returncode is None
            gate.set()
            assert (await response.read()).decode() == generation.events(skip=1)
        assert await asyncio.wait_for(process.wait(), 15) == 0


async def test_port_in_use_is_one_sentence(context, generation):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with router_process(context, generation, port=port) as process:
            _, errors = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}: the port is in use" in errors.decode()
