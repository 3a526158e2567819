"""What every registry promises."""

import asyncio

import pytest

from diptych.errors import ConfigError
from diptych.wire import WorkerInfo
from tests.diptych.discovery.conftest import World

ALL = ["static", "local", "embedded", "etcd"]
LEASED = ["local", "embedded", "etcd"]


def worker(worker_id: str = "w:1-a", **fields: object) -> WorkerInfo:
    facts = {"url": "http://127.0.0.1:1", "role": "CONTEXT", "incarnation": "a", "model": "m", **fields}
    return WorkerInfo(worker_id=worker_id, **facts)  # type: ignore[arg-type]


every_registry = pytest.mark.parametrize("world", ALL, indirect=True)
every_leased = pytest.mark.parametrize("world", LEASED, indirect=True)


@every_registry
async def test_the_first_snapshot_comes_even_when_it_is_empty(world: World):
    await world.reader().until()


@every_registry
async def test_a_snapshot_after_each_change(world: World):
    registry, reader = world.writer(), world.reader()
    await reader.until()
    info = worker(state="STARTING", load={"running": 1.5}, layout="f00")
    lease = await registry.register(info)
    assert await reader.until("w:1-a") == (info,)
    await lease.update(worker(state="READY"))
    await reader.until("w:1-a", state="READY", load={})
    other = await world.writer().register(worker("w:2-b"))
    await reader.until("w:1-a", "w:2-b")
    await lease.close()
    await reader.until("w:2-b")
    await other.close()
    await reader.until()
    assert not lease.removed.is_set()


@every_registry
async def test_a_late_reader_sees_everything_and_two_see_the_same(world: World):
    registry = world.writer()
    for number in range(3):
        await registry.register(worker(f"w:{number}-a", url=f"http://h:{number + 1}"))
    first, second = world.reader(), world.reader()
    seen = await first.until("w:0-a", "w:1-a", "w:2-a")
    assert await second.until("w:0-a", "w:1-a", "w:2-a") == seen


@every_registry
async def test_closing_twice_is_harmless_and_an_update_after_it_has_no_effect(world: World):
    registry, reader = world.writer(), world.reader()
    lease = await registry.register(worker())
    await reader.until("w:1-a")
    await lease.close()
    await lease.close()
    await lease.update(worker(state="DRAINING"))
    await reader.until()
    await registry.register(worker("w:2-b"))
    await reader.until("w:2-b")


@every_registry
async def test_a_lease_is_for_one_worker(world: World):
    lease = await world.writer().register(worker())
    with pytest.raises(ValueError, match="w:1-a"):
        await lease.update(worker("other"))


@every_registry
async def test_another_process_may_not_take_the_id(world: World):
    reader = world.reader()
    await world.writer().register(worker())
    with pytest.raises(ConfigError, match="'w:1-a' is registered already"):
        await world.writer().register(worker(incarnation="b"))
    await reader.until("w:1-a", incarnation="a")


@every_registry
async def test_the_last_of_many_updates_stays(world: World):
    registry, reader = world.writer(), world.reader()
    lease = await registry.register(worker())
    for number in range(50):
        await lease.update(worker(load={"running": float(number)}))
    await reader.until("w:1-a", load={"running": 49.0})


@every_leased
async def test_a_crashed_worker_expires(world: World):
    registry, reader = world.writer(), world.reader()
    crashed, alive = await registry.register(worker()), await registry.register(worker("w:2-b"))
    await reader.until("w:1-a", "w:2-b")
    await world.crash(crashed)
    await reader.until("w:2-b")
    assert not alive.removed.is_set()


@every_leased
async def test_a_worker_that_lives_stays_for_longer_than_its_lease(world: World):
    registry, reader = world.writer(), world.reader()
    await registry.register(worker())
    await reader.until("w:1-a")
    await asyncio.sleep(3.0)  # the lease is at most 2 s: this is the time that must pass
    assert [snapshot for snapshot in reader.snapshots if snapshot] == [(worker(),)]
    assert reader.ids == ["w:1-a"]


@every_leased
async def test_deleted_by_hand_means_drain_and_not_register_again(world: World):
    registry, reader = world.writer(), world.reader()
    lease = await registry.register(worker())
    other = await registry.register(worker("w:2-b"))
    await reader.until("w:1-a", "w:2-b")
    await world.delete_by_hand("w:1-a")
    await asyncio.wait_for(lease.removed.wait(), 5.0)
    await reader.until("w:2-b")
    await lease.update(worker(state="DRAINING"))  # what a worker does then
    await lease.close()
    assert reader.ids == ["w:2-b"]
    assert not other.removed.is_set()
    assert all("w:1-a" not in [info.worker_id for info in shown] for shown in reader.snapshots[-1:])


@every_registry
async def test_closing_the_registry_ends_its_watchers(world: World):
    registry = world.connect()
    watch = registry.watch()
    await anext(watch)
    ended = asyncio.ensure_future(_drain(watch))
    await registry.close()
    await asyncio.wait_for(ended, 5.0)


async def _drain(watch) -> None:
    async for _ in watch:
        pass
