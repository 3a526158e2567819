"""More requests than the workers can do: what is taken in is done in time, the rest is told so at once."""

import asyncio
import time
from collections import Counter

from tests.fakes.fake_worker import FakeWorker
from tests.router.conftest import Config, StartRouter

WHOLE = {"model": "fake", "prompt": "hello"}
SERVICE_S = 0.05
SLOTS = 4


class SlowWorker(FakeWorker):
    """Does SLOTS legs at a time; others wait in order, however long."""

    def __init__(self, name: str, *, role: str) -> None:
        super().__init__(name, role=role)
        self.slots = asyncio.Semaphore(SLOTS)

    async def _answer(self, request, seen):
        if seen.leg != "generation":
            return await super()._answer(request, seen)
        async with self.slots:
            await asyncio.sleep(SERVICE_S)
            return await super()._answer(request, seen)


async def offer(router, *, rate: float, seconds: float, deadline_s: float) -> tuple[Counter, list[float]]:
    """Requests at a steady rate, whatever becomes of them: statuses, and how long refusals took."""
    statuses: Counter[int | str] = Counter()
    refusals: list[float] = []

    async def ask() -> None:
        started = time.monotonic()
        headers = {"X-Diptych-Timeout-Ms": str(int(deadline_s * 1000))}
        async with router.post(WHOLE, headers=headers) as response:
            await response.read()
            took = time.monotonic() - started
            statuses[response.status] += 1
            if response.status == 429:
                assert int(response.headers["Retry-After"]) >= 1
                refusals.append(took)
            elif response.status == 200 and took <= deadline_s * 1.1:
                statuses["good"] += 1

    async with asyncio.TaskGroup() as group:
        begun = time.monotonic()
        for number in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
            group.create_task(ask())
    return statuses, refusals


async def test_goodput_does_not_collapse(start_router: StartRouter, context, stack):
    """At twice the load that the worker can do, as many requests are answered in time as at its limit."""
    worker = await stack.enter_async_context(SlowWorker("slow", role="GENERATION"))
    config = Config(max_concurrent_requests=2 * SLOTS, max_queued_requests=1000)
    router = await start_router(context, worker, config=config)
    capacity = SLOTS / SERVICE_S
    fitting, _ = await offer(router, rate=0.6 * capacity, seconds=1.5, deadline_s=1.0)
    assert set(fitting) == {200, "good"}
    beyond, refusals = await offer(router, rate=2 * capacity, seconds=3.0, deadline_s=1.0)
    assert set(beyond) <= {200, 429, 504, "good"}  # nothing is cut off
    assert beyond[429] > 0
    assert beyond["good"] / 3.0 >= 0.9 * fitting["good"] / 1.5
    # Deadlines that pass while a request runs: only as many as a busy machine makes late.
    assert beyond[504] <= 0.1 * beyond["good"]
    assert beyond["good"] >= 0.9 * beyond[200]
    # Told at once: those that waited for a refusal are the few whose wait was foretold wrong.
    assert sorted(refusals)[len(refusals) // 2] < 0.2


async def test_without_a_line_the_answer_is_429(start_router: StartRouter, context, generation):
    gate = context.script.hold["context"] = asyncio.Event()
    router = await start_router(
        context, generation, config=Config(max_concurrent_requests=1, max_queued_requests=0)
    )
    running = asyncio.create_task(router.text(WHOLE))
    await router.until(lambda: router.admission.running == 1)
    async with router.post(WHOLE) as response:
        assert response.status == 429
        assert response.headers["Retry-After"] == "1"
        error = (await response.json())["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
    gate.set()
    await running
    await router.text(WHOLE)
    assert await router.metric("diptych_router_overload_refusals_total") == 1
    assert await router.metric("diptych_router_running_limit") == 1


async def test_a_client_that_leaves_the_line_frees_its_place(start_router: StartRouter, context, generation):
    gate = context.script.hold["context"] = asyncio.Event()
    router = await start_router(context, generation, config=Config(max_concurrent_requests=1))
    running = asyncio.create_task(router.text(WHOLE))
    await router.until(lambda: router.admission.running == 1)
    leaver = asyncio.create_task(router.text(WHOLE))
    await router.until(lambda: router.admission.waiting == 1)
    leaver.cancel()
    await router.until(lambda: router.admission.waiting == 0)
    gate.set()
    await running
    assert len(context.legs("context")) == 1


async def test_a_timeout_that_the_client_asks_for(start_router: StartRouter, context, generation):
    context.script.fail["context"] = "hang"
    router = await start_router(context, generation)
    async with router.post(WHOLE, headers={"X-Diptych-Timeout-Ms": "100"}) as response:
        assert response.status == 504
    async with router.post(WHOLE, headers={"X-Diptych-Timeout-Ms": "-1"}) as response:
        assert response.status == 400
