"""The live workers: registry snapshots, probes, models."""

import logging

from diptych.discovery.static import StaticRegistry
from diptych.errors import WorkerLost
from diptych.router.pool import Pool
from diptych.router.settings import Limits
from diptych.wire import WorkerInfo
from tests.fakes.fake_worker import FakeWorker

QUICK = Limits(probe_s=2.0, probe_interval_s=0.02, probe_retry_s=0.02, probe_retry_max_s=0.05)


def info(worker: FakeWorker, **changes) -> WorkerInfo:
    facts = {"worker_id": worker.name, "url": worker.url, "role": worker.role, **changes}
    return WorkerInfo(**facts)


def ids(workers) -> list[str]:
    return [worker.worker_id for worker in workers]


async def test_worker_is_ready_after_its_first_good_probe(context):
    async with Pool(StaticRegistry([info(context)]), QUICK) as pool:
        assert pool.ready("CONTEXT") == ()
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        assert pool.ready("GENERATION") == ()
        assert pool.models() == ("fake",)


async def test_role_both_takes_both_legs(context):
    async with Pool(StaticRegistry([info(context, role="BOTH")]), QUICK) as pool:
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        assert ids(pool.ready("GENERATION")) == ["c0"]


async def test_worker_that_comes_up_later(context, caplog):
    await context.stop()
    async with Pool(StaticRegistry([info(context)]), QUICK) as pool:
        assert await pool.wait_until(lambda pool: all(w.state == "DOWN" for w in pool.workers), 5.0)
        await context.start()
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)


async def test_lost_worker_is_down_at_once_and_probed_back(context):
    async with Pool(StaticRegistry([info(context)]), QUICK) as pool:
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        (worker,) = pool.workers
        pool.report_lost(worker, WorkerLost("gone"))
        assert pool.ready("CONTEXT") == ()
        assert worker.state == "DOWN"
        assert pool.models() == ("fake",)
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)


async def test_worker_says_itself_that_it_drains(context):
    async with Pool(StaticRegistry([info(context)]), QUICK) as pool:
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        context.script.state = "DRAINING"
        assert await pool.wait_until(lambda pool: not pool.ready("CONTEXT"), 5.0)
        assert pool.workers[0].state == "DRAINING"


async def test_registry_adds_changes_and_removes(context, spare_context):
    registry = StaticRegistry()
    async with Pool(registry, QUICK) as pool:
        first = await registry.register(info(context))
        second = await registry.register(info(spare_context))
        assert await pool.wait_until(lambda pool: ids(pool.ready("CONTEXT")) == ["c0", "c1"], 5.0)
        await first.update(info(context, state="DRAINING"))
        assert await pool.wait_until(lambda pool: ids(pool.ready("CONTEXT")) == ["c1"], 5.0)
        spare_context.script.state = "DRAINING"
        await second.close()
        assert await pool.wait_until(lambda pool: ids(pool.workers) == ["c0"], 5.0)
        spare_context.script.state = "READY"
        await first.update(info(context, url=spare_context.url))
        assert await pool.wait_until(lambda pool: ids(pool.ready("CONTEXT")) == ["c0"], 5.0)
        assert pool.workers[0].client.url == spare_context.url


async def test_server_without_server_info_is_asked_for_its_health(context):
    context.has_server_info = False
    async with Pool(StaticRegistry([info(context)]), QUICK) as pool:
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        assert pool.models() == ()
        assert ids(pool.ready("CONTEXT", "any")) == ["c0"]
        context.script.state = "DRAINING"
        assert await pool.wait_until(lambda pool: not pool.ready("CONTEXT"), 5.0)


async def test_different_models_are_reported_once_and_kept_apart(context, generation, caplog):
    generation.model = "other"
    with caplog.at_level(logging.ERROR):
        async with Pool(StaticRegistry([info(context), info(generation)]), QUICK) as pool:
            assert await pool.wait_until(lambda pool: len(pool.models()) == 2, 5.0)
            assert ids(pool.ready("CONTEXT", "fake")) == ["c0"]
            assert pool.ready("GENERATION", "fake") == ()
            assert ids(pool.ready("GENERATION", "other")) == ["g0"]
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "'fake' on c0" in record.getMessage()
    assert "'other' on g0" in record.getMessage()


async def test_registry_that_fails_is_watched_again(context, caplog):
    class Failing(StaticRegistry):
        failures = 1

        def watch(self):
            if self.failures:
                self.failures -= 1
                raise OSError("no route")
            return super().watch()

    limits = Limits(probe_retry_s=0.02)
    async with Pool(Failing([info(context)]), limits) as pool:
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
    assert "serving on its last snapshot" in caplog.text


async def test_worker_with_an_impossible_url_is_left_out(context, caplog):
    registry = StaticRegistry([WorkerInfo(worker_id="bad", url="nowhere", role="CONTEXT"), info(context)])
    async with Pool(registry, QUICK) as pool:
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        assert ids(pool.workers) == ["c0"]
    assert "worker bad is left out" in caplog.text


async def test_what_a_worker_says_beyond_our_legs_is_the_load_of_others(context):
    async with Pool(StaticRegistry([info(context)]), QUICK) as pool:
        assert await pool.wait_until(lambda pool: bool(pool.ready("CONTEXT")), 5.0)
        (worker,) = pool.workers
        with worker:
            worker.note_load(4)
        assert worker.elsewhere == 3
        worker.note_load(0)
        assert worker.elsewhere == 0
