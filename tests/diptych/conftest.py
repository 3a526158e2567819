"""Servers on real sockets."""

from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web


@pytest.fixture
async def aiohttp_server() -> AsyncIterator[Callable[[web.Application], Awaitable[str]]]:
    """Start an application; gives its URL."""
    runners: list[web.AppRunner] = []

    async def start(app: web.Application) -> str:
        runner = web.AppRunner(app, access_log=None)
        runners.append(runner)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}"

    yield start
    for runner in runners:
        await runner.cleanup()
