"""F5: etcd under load: killed while a worker dies, wiped, stopped, without its leases. Clients notice nothing."""

import asyncio

from fault_mesh import KEYS, until

NUM_TOKENS = 40
LEASE_S = 5  # health_check_timeout's default


async def beyond_a_lease(load) -> None:
    """The load goes on for longer than a lease lives."""
    loop = asyncio.get_running_loop()
    end = loop.time() + LEASE_S + 1
    while loop.time() < end:
        await load.more(1)


async def all_announced(faults) -> None:
    await until("all workers in etcd", lambda: all(map(faults.is_announced, faults.workers)))


async def test_etcd_is_killed_and_a_worker_dies_meanwhile(faults):
    removals = faults.router.log.read_text().count("is removed")
    victim, *others = faults.generations
    async with await faults.load("greedy", num_tokens=NUM_TOKENS) as load:
        faults.etcd.kill()
        await load.more(3)
        victim.kill()
        await until("the router to know", lambda: faults.state(victim) == "DOWN")
        await beyond_a_lease(load)
        for worker in (*others, *faults.contexts):
            assert faults.state(worker) == "READY"
        assert faults.router.log.read_text().count("is removed") == removals
        faults.etcd.start()
        await load.more(6)


async def test_etcd_is_wiped(faults):
    removals = faults.router.log.read_text().count("is removed")
    async with await faults.load("greedy", num_tokens=NUM_TOKENS) as load:
        faults.etcd.wipe()
        await load.more(3)
        faults.etcd.start()
        await all_announced(faults)
        await load.more(6)
    assert faults.router.log.read_text().count("is removed") == removals


async def test_etcd_hangs(faults):
    """As on a disk that stands still: connections stay open and nothing is answered."""
    async with await faults.load("greedy", num_tokens=NUM_TOKENS) as load:
        faults.etcd.pause()
        await beyond_a_lease(load)
        faults.etcd.resume()
        await all_announced(faults)
        await load.more(6)


async def test_all_leases_are_lost(faults):
    async with await faults.load("greedy", num_tokens=NUM_TOKENS) as load:
        faults.etcd.end_leases(KEYS)
        await load.more(3)
        await all_announced(faults)
        await load.more(6)
