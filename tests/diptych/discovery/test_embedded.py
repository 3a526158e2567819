"""The registry that a router keeps: restarts, expiry with its own clock, trust, bad requests."""

import asyncio

import aiohttp
import pytest

from diptych.discovery.embedded import EmbeddedRegistry
from diptych.discovery.embedded_client import PATH, RemoteRegistry
from diptych.errors import ConfigError
from tests.diptych.discovery.conftest import EmbeddedWorld
from tests.diptych.discovery.test_conformance import worker


def test_silence_ends_a_worker_and_a_heartbeat_keeps_it():
    now = [0.0]
    registry = EmbeddedRegistry(inactive_timeout_s=10.0, clock=lambda: now[0])
    registry.announce(worker())
    registry.announce(worker("w:2-b"))
    now[0] = 9.0
    assert registry.announce(worker())
    now[0] = 10.0
    assert [info.worker_id for info in registry.snapshot()] == ["w:1-a"]
    now[0] = 19.0
    assert registry.snapshot() == ()


def test_who_was_taken_out_does_not_come_back():
    registry = EmbeddedRegistry()
    registry.announce(worker())
    assert registry.withdraw("w:1-a")
    assert not registry.withdraw("w:1-a")
    assert not registry.announce(worker())
    assert registry.announce(worker("w:1-c", incarnation="c"))  # its next process


async def test_a_router_that_restarts_knows_its_workers_again():
    world = EmbeddedWorld()
    await world.start()
    lease = await world.writer().register(worker())
    await world.stop()
    world.registry = EmbeddedRegistry(heartbeat_interval_s=0.2, inactive_timeout_s=0.8)
    reader = world.reader()
    await reader.until()
    await world.start()
    await reader.until("w:1-a", incarnation="a")
    assert not lease.removed.is_set()
    await world.close()


async def test_a_router_that_is_down_at_the_start():
    world = EmbeddedWorld()
    await world.start()
    await world.stop()
    await asyncio.wait_for(world.writer().register(worker()), 5.0)
    await world.start()
    await world.reader().until("w:1-a")
    await world.close()


async def test_leaving_while_the_router_is_down_is_quick():
    world = EmbeddedWorld()
    await world.start()
    lease = await world.writer().register(worker())
    await world.stop()
    await asyncio.wait_for(lease.close(), 3.0)
    await world.close()


async def test_without_the_secret_nobody_writes_or_reads(caplog: pytest.LogCaptureFixture):
    world = EmbeddedWorld(secret="open sesame")
    await world.start()
    stranger = RemoteRegistry(world.url, headers={})
    await stranger.register(worker("w:9-z"))
    async with aiohttp.ClientSession() as session, session.get(world.url + PATH) as response:
        assert response.status == 403
        error = (await response.json())["error"]
    assert error["code"] == "forbidden"
    assert "X-Diptych-Cluster-Secret" in error["message"]
    await world.writer().register(worker())
    await world.reader().until("w:1-a")
    assert "status 403" in caplog.text
    await stranger.close()
    await world.close()


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/a", b"{", 400, "WorkerInfo"),
        ("/a", b'{"worker_id": "b", "url": "http://h:1", "role": "CONTEXT"}', 400, "'b' in the body and 'a'"),
        ("/a", b'{"worker_id": "a", "url": "nowhere", "role": "CONTEXT"}', 400, "the port is missing"),
        ("/a", b'{"worker_id": "a", "url": "http://h:1", "role": "KING"}', 400, "KING"),
    ],
)
async def test_bad_announcements(path: str, body: bytes, status: int, words: str):
    world = EmbeddedWorld()
    await world.start()
    async with (
        aiohttp.ClientSession() as session,
        session.put(world.url + PATH + path, data=body) as response,
    ):
        assert response.status == status
        assert words in (await response.json())["error"]["message"]
    async with aiohttp.ClientSession() as session, session.delete(world.url + PATH + path) as response:
        assert response.status == 404
    await world.close()


async def test_the_same_id_from_two_processes():
    world = EmbeddedWorld()
    await world.start()
    await world.writer().register(worker())
    with pytest.raises(ConfigError, match="registered already"):
        await world.writer().register(worker(incarnation="b"))
    await world.close()
