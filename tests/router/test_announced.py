"""What a router makes of announcements: states, changes of process, names of one address, minimal_instances."""

import asyncio
import logging
import time
from dataclasses import dataclass

import pytest

from diptych.discovery.embedded import EmbeddedRegistry
from diptych.discovery.static import StaticRegistry
from diptych.errors import Unavailable, WorkerLost
from diptych.router.pool import Pool
from diptych.router.settings import Limits
from diptych.router.status import StartGate, describe_missing, missing_roles
from diptych.wire import WorkerInfo
from tests.router.test_pool import QUICK, ids, info

SLOW = Limits(probe_s=2.0, probe_interval_s=60.0, probe_retry_s=60.0)


@dataclass(frozen=True)
class Minimal:
    context_servers: int = 1
    generation_servers: int = 1


async def test_a_worker_takes_legs_as_soon_as_it_is_announced_ready(context):
    registry = StaticRegistry()
    async with Pool(registry, SLOW) as pool:
        context.script.state = "STARTING"
        lease = await registry.register(info(context, state="STARTING"))
        assert await pool.wait_until(lambda pool: any(w.facts for w in pool.workers), 5.0)
        assert pool.ready("CONTEXT") == ()
        context.script.state = "READY"
        await lease.update(info(context, state="READY"))
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        await lease.update(info(context, state="DRAINING"))
        assert await pool.wait_until(lambda pool: not pool.ready("CONTEXT"), 5.0)


async def test_another_role_counts_at_once(context):
    registry = StaticRegistry()
    async with Pool(registry, SLOW) as pool:
        lease = await registry.register(info(context))
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        await lease.update(info(context, role="GENERATION"))
        assert await pool.wait_until(lambda pool: bool(pool.ready("GENERATION")), 5.0)
        assert pool.ready("CONTEXT") == ()


async def test_a_worker_that_was_down_is_asked_when_it_is_announced_anew(context):
    registry = StaticRegistry()
    await context.stop()
    async with Pool(registry, SLOW) as pool:
        lease = await registry.register(info(context, state="STARTING"))
        assert await pool.wait_until(lambda pool: [w.state for w in pool.workers] == ["DOWN"], 5.0)
        await context.start()
        await lease.update(info(context, state="READY"))
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)


async def test_added_and_removed_are_logged_in_the_words_that_operators_wait_for(context, caplog):
    registry = StaticRegistry()
    with caplog.at_level(logging.INFO, logger="diptych"):
        async with Pool(registry, QUICK) as pool:
            lease = await registry.register(info(context))
            assert await pool.wait_until(lambda pool: bool(pool.workers), 5.0)
            context.script.state = "DRAINING"
            await lease.close()
            assert await pool.wait_until(lambda pool: not pool.workers, 5.0)
    assert [text for text in caplog.messages if text.startswith("Server")] == [
        f"Server {context.url} is added",
        f"Server {context.url} is removed",
    ]


async def test_a_registry_that_loses_everybody_does_not_end_the_service(context, spare_context, generation):
    """Leases that end together: who answers and is the last of its role stays until another one is there."""
    registry = StaticRegistry([info(generation)])
    async with Pool(registry, QUICK) as pool:
        first = await registry.register(info(context))
        second = await registry.register(info(spare_context))
        assert await pool.wait_until(lambda pool: ids(pool.ready("CONTEXT")) == ["c0", "c1"], 5.0)
        await first.close()
        assert await pool.wait_until(lambda pool: ids(pool.workers) == ["g0", "c1"], 5.0)
        await second.close()
        await registry.register(info(generation, worker_id="g1"))  # the snapshot after that has come
        assert await pool.wait_until(lambda pool: "g1" in ids(pool.ready("GENERATION")), 5.0)
        assert ids(pool.ready("CONTEXT")) == ["c1"]
        await registry.register(info(context))
        assert await pool.wait_until(lambda pool: ids(pool.ready("CONTEXT")) == ["c0"], 5.0)


@pytest.mark.parametrize("end", ["DRAINING", "stopped", "lost"])
async def test_the_last_of_a_role_is_gone_when_it_does_not_take_legs_any_more(context, generation, end):
    registry = StaticRegistry()
    async with Pool(registry, QUICK) as pool:
        lease = await registry.register(info(context))
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        await lease.close()
        await registry.register(info(generation))  # the snapshot after that has come
        assert await pool.wait_until(lambda pool: ids(pool.workers) == ["c0", "g0"], 5.0)
        if end == "stopped":
            await context.stop()
        elif end == "lost":
            pool.report_lost(pool.workers[0], WorkerLost("a leg broke off"))
        else:
            context.script.state = end
        assert await pool.wait_until(lambda pool: ids(pool.workers) == ["g0"], 5.0)


async def test_a_leg_on_a_dropped_worker_that_hangs_is_given_up(context, spare_context):
    """Its lease ends before the router's probes find out: they must go on for what runs there."""
    registry = StaticRegistry([info(spare_context)])
    limits = Limits(probe_s=0.1, probe_interval_s=0.05, probe_retry_s=0.05)
    async with Pool(registry, limits) as pool:
        lease = await registry.register(info(context))
        assert await pool.wait_until(lambda pool: len(pool.ready("CONTEXT")) == 2, 5.0)
        (worker,) = (worker for worker in pool.workers if worker.worker_id == "c0")
        context.script.hold["context"] = asyncio.Event()

        async def leg() -> None:
            with worker:
                body = b'{"disaggregated_params": {"request_type": "context_only"}}'
                deadline = time.monotonic() + 60
                await worker.client.request("POST", "/v1/completions", deadline=deadline, body=body)

        running = asyncio.create_task(leg())
        await context.wait_for(lambda: context.legs("context"))
        await lease.close()
        assert await pool.wait_until(lambda pool: ids(pool.workers) == ["c1"], 5.0)
        context.hangs = True
        with pytest.raises(WorkerLost):
            await asyncio.wait_for(running, 10)


async def test_a_new_load_alone_changes_nothing(context):
    registry = StaticRegistry()
    async with Pool(registry, SLOW) as pool:
        lease = await registry.register(info(context))
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        ready = pool.ready("CONTEXT")
        [worker] = pool.workers
        await lease.update(info(context, load={"running": 3.0}))
        await pool.wait_until(lambda pool: worker.info.load == {"running": 3.0}, 0.2)
        assert worker.info.load == {"running": 3.0}
        assert pool.ready("CONTEXT") is ready
        assert not worker.kick.is_set()


async def test_the_place_of_a_process_that_is_gone_takes_nothing(context):
    """The fake answers as incarnation 1: that is not who was announced here."""
    old = info(context, worker_id="old", incarnation="0")
    new = info(context, worker_id="new", incarnation="1")
    async with Pool(StaticRegistry([old, new]), QUICK) as pool:
        assert await pool.wait_until(lambda pool: [bool(w.facts) for w in pool.workers] == [True, True], 5.0)
        assert [worker.state for worker in pool.workers] == ["DOWN", "READY"]
        assert ids(pool.ready("CONTEXT")) == ["new"]


async def test_one_process_under_another_name_stays_in_service(context):
    class Script(StaticRegistry):
        def rename(self, old: WorkerInfo, new: WorkerInfo) -> None:
            self._workers.pop(old.worker_id)
            self._add(new)
            self._wake()

    listed, named = info(context, worker_id=context.url), info(context, worker_id="c0-1", incarnation="1")
    registry = Script([listed])
    async with Pool(registry, SLOW) as pool:
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        gaps = []
        registry.rename(listed, named)
        await pool.wait_until(
            lambda pool: gaps.append(not pool.ready("CONTEXT")) or "c0-1" in ids(pool.workers), 5.0
        )
        assert ids(pool.ready("CONTEXT")) == ["c0-1"]
        assert gaps
        assert not any(gaps)


async def test_minimal_instances_hold_requests_back_until_they_were_ready_once(
    context, generation, spare_generation
):
    registry = StaticRegistry([info(context), info(generation)])
    async with Pool(registry, QUICK, minimal=Minimal(generation_servers=2)) as pool:
        gate = StartGate(pool, is_open=False)
        assert await pool.wait_until(
            lambda pool: missing_roles(pool) == ["GENERATION"] and pool.ready("GENERATION"), 5.0
        )
        assert describe_missing(pool) == "1 of 2 generation workers are ready (g0 is READY)"
        with pytest.raises(Unavailable, match="1 of 2 generation workers") as refused:
            gate.check()
        assert refused.value.headers() == {"Retry-After": "1"}
        lease = await registry.register(info(spare_generation))
        assert await pool.wait_until(lambda pool: not missing_roles(pool), 5.0)
        gate.check()
        await lease.close()
        assert await pool.wait_until(lambda pool: missing_roles(pool) == ["GENERATION"], 5.0)
        gate.check()


async def test_a_router_keeps_a_registry_when_it_is_told_to(start_router, context):
    router = await start_router(registry=EmbeddedRegistry(), wait_ready=False)
    announcement = {"worker_id": "c0", "url": context.url, "role": "CONTEXT"}
    path = router.url + "/internal/registry/workers"
    async with router.session.put(f"{path}/c0", json=announcement) as response:
        assert response.status == 200
        assert await response.json() == {"heartbeat_interval_s": 5.0}
    assert await router.pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
    async with router.session.get(path) as response:
        assert [entry["worker_id"] for entry in await response.json()] == ["c0"]


async def test_other_routers_have_no_such_routes(start_router, context, generation):
    router = await start_router(context, generation)
    async with router.session.get(router.url + "/internal/registry/workers") as response:
        assert response.status == 404
