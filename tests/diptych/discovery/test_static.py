"""Addresses, and the registry that lives in this process."""

import asyncio

import pytest

from diptych.discovery.address import parse_address
from diptych.discovery.static import StaticRegistry
from diptych.errors import ConfigError
from diptych.wire import WorkerInfo

WORKER = WorkerInfo(worker_id="w", url="http://h:1", role="CONTEXT")


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost:8001", "http://localhost:8001"),
        ("http://10.0.0.1:80", "http://10.0.0.1:80"),
        ("http://host:8001/", "http://host:8001"),
        (" [::1]:8001 ", "http://[::1]:8001"),
        ("http://[fe80::1]:9", "http://[fe80::1]:9"),
    ],
)
def test_addresses(text, url):
    assert parse_address(text).url == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "host",
        ":80",
        "host:",
        "host:0",
        "host:99999",
        "host:x",
        "https://h:1",
        "h:1/path",
        "u@h:1",
        "[::1",
        "h:1?q",
    ],
)
def test_addresses_that_cannot_be_used(text):
    with pytest.raises(ConfigError, match="write host:port") as caught:
        parse_address(text)
    assert repr(text) in caught.value.message


async def test_urls_become_workers():
    registry = StaticRegistry.from_urls(["a:1", "b:1"], ["http://b:1", "c:1"])
    (snapshot,) = [await anext(registry.watch())]
    assert {(w.url, w.role) for w in snapshot} == {
        ("http://a:1", "CONTEXT"),
        ("http://b:1", "BOTH"),
        ("http://c:1", "GENERATION"),
    }


async def test_watch_gives_whole_snapshots_and_misses_no_change():
    registry = StaticRegistry()
    watch = registry.watch()
    assert await anext(watch) == ()
    lease = await registry.register(WORKER)  # while the watcher is busy
    assert await asyncio.wait_for(anext(watch), 1) == (WORKER,)
    draining = WorkerInfo(worker_id="w", url="http://h:1", role="CONTEXT", state="DRAINING")
    await lease.update(draining)
    assert await asyncio.wait_for(anext(watch), 1) == (draining,)
    await lease.close()
    await lease.close()
    await lease.update(WORKER)
    assert await asyncio.wait_for(anext(watch), 1) == ()


async def test_ids_are_unique():
    registry = StaticRegistry([WORKER])
    with pytest.raises(ConfigError, match="'w'"):
        await registry.register(WORKER)


async def test_closing_ends_watchers():
    registry = StaticRegistry([WORKER])
    watch = registry.watch()
    await anext(watch)
    await registry.close()
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(watch), 1)
