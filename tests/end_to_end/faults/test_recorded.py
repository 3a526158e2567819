"""F5, F14 for longer, with their figures in benchmarks/results: everything is restarted; etcd is away for minutes."""

import asyncio
import re

import pytest
from fault_mesh import roll_router, until

NUM_TOKENS = 60
NUM_CLIENTS = 4
OUTAGE_S = 120.0


def figures(load, seconds: float) -> dict:
    return {
        "clients": NUM_CLIENTS,
        "requests": len(load.outcomes),
        "errors": len(load.violations),
        "longest_stall_s": round(load.longest_stall_s, 2),
        "seconds": round(seconds, 1),
    }


@pytest.mark.slow
async def test_everything_is_restarted_under_load(faults, record):
    """Every worker, one after the other, then every router process."""
    names = ("greedy", "seeded", "chat with stop")
    pair = faults.mesh.router("pair", [], [], metadata=faults.metadata, num_workers=2).wait_ready()
    loop = asyncio.get_running_loop()
    try:
        faults.wait_known(pair)
        started = loop.time()
        async with await faults.load(
            *names, num_tokens=NUM_TOKENS, num_clients=NUM_CLIENTS, router=pair
        ) as load:
            await faults.roll_workers()
            await roll_router(pair)
            await load.more(NUM_CLIENTS)
        record("rolling_restart", **figures(load, loop.time() - started))
    finally:
        assert pair.stop() == 0


@pytest.mark.slow
@pytest.mark.timeout(OUTAGE_S + 300)
async def test_etcd_is_away_and_a_worker_dies(faults, record):
    """Only what ran on that worker moves."""
    victim = faults.generations[0]
    loop = asyncio.get_running_loop()
    log_start = len(faults.router.log.read_text())
    resumed = faults.router.metric("gen_resumed_streams_total")
    async with await faults.load("greedy", "seeded", num_tokens=NUM_TOKENS, num_clients=NUM_CLIENTS) as load:
        started = loop.time()
        faults.etcd.kill()
        while loop.time() < started + OUTAGE_S / 2:
            await load.more(1)
        victim.kill()
        await until("the router to know", lambda: faults.state(victim) == "DOWN")
        while loop.time() < started + OUTAGE_S:
            await load.more(1)
        seconds = loop.time() - started
        faults.etcd.start()
        victim.start()
        await until("the worker to be back", lambda: faults.state(victim) == "READY", 60.0)
        await load.more(NUM_CLIENTS)
    log = faults.router.log.read_text()[log_start:]
    lost = re.findall(r"leg: The worker at (http://[^ ]+)", log)
    record(
        "etcd_outage",
        **figures(load, seconds),
        legs_that_moved=len(lost),
        streams_resumed=faults.router.metric("gen_resumed_streams_total") - resumed,
    )
    assert set(lost) <= {victim.url}
