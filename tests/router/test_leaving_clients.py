"""Clients that go away or do not read, in each leg: the legs end, the tickets are returned."""

import asyncio

from diptych.router.flow import Flow
from tests.router.conftest import STREAM, WHOLE, Config, StartRouter, no_connections


async def test_client_gone_during_the_context_leg_revokes_what_it_gets(
    start_router: StartRouter, context, generation
):
    router = await start_router(context, generation)
    request = await router.held(STREAM, context, "context")
    request.cancel()
    await context.wait_fate("context", "cancelled")
    await no_connections(router)
    assert await router.metric("cancelled_requests_total") == 1
    asked = context.seen[0].body["disaggregated_params"]["disagg_request_id"]
    await context.wait_for(lambda: context.revoked == [asked])


async def test_client_gone_in_the_turn_in_which_the_context_answer_arrives(
    start_router: StartRouter, context, generation, monkeypatch
):
    """The answer is read and the request is cancelled before it wakes: the tickets must not be forgotten."""
    handlers: list[asyncio.Task] = []

    async def run(self, call, client):
        handlers.append(asyncio.current_task())
        return await original(self, call, client)

    original = Flow.run
    monkeypatch.setattr(Flow, "run", run)
    router = await start_router(context, generation)
    request = await router.held(STREAM, context, "context")
    (worker,) = (w for w in router.pool.workers if w.worker_id == context.url)
    (connection,) = (c for c in worker.client.connections if c.exchange is not None)
    exchange = connection.exchange

    class Spy:
        def feed(self, data):
            exchange.feed(data)
            if connection.exchange is None:  # that was the last byte
                handlers[0].cancel()
            else:
                connection.exchange = self

        def __getattr__(self, name):
            return getattr(exchange, name)

    connection.exchange = Spy()
    context.script.hold["context"].set()
    await context.wait_for(lambda: context.revoked)
    assert generation.legs("generation") == []
    request.cancel()


async def test_client_gone_before_generation_answers_returns_tickets(
    start_router: StartRouter, context, generation
):
    router = await start_router(context, generation)
    request = await router.held(WHOLE, generation, "generation")
    request.cancel()
    await generation.wait_fate("generation", "cancelled")
    await context.wait_for(lambda: context.released == ["c0-ticket-1"])
    await no_connections(router)


async def test_client_gone_in_the_middle_of_the_stream(start_router: StartRouter, context, generation):
    generation.script.hold_after[2] = asyncio.Event()
    router = await start_router(context, generation)
    async with router.streaming(2) as response:
        response.close()
    await generation.wait_fate("generation", "cancelled")
    await no_connections(router)


async def test_client_gone_while_its_stream_waits_for_a_worker(
    start_router: StartRouter, context, generation
):
    router = await start_router(context, generation)
    generation.script.hold_after[2] = asyncio.Event()
    async with router.streaming(2) as response:
        await context.stop()
        await generation.stop()
        await router.until(lambda: not any(worker.ready for worker in router.pool.workers))
        response.close()
    for _ in range(1000):
        if await router.metric("cancelled_requests_total") == 1:
            break
    assert await router.metric("cancelled_requests_total") == 1


async def test_slow_client_holds_the_worker_back(start_router: StartRouter, context, generation):
    """The router buffers a bounded part of what a client does not read, and loses none of it."""
    generation.script.tokens = [str(n) for n in range(400)]
    generation.script.padding = 100_000
    router = await start_router(context, generation)
    async with router.streaming(1, read_bufsize=1024) as response:
        (worker,) = (w for w in router.pool.workers if w.worker_id == generation.url)
        paused = False
        for _ in range(2000):
            reading = [c.transport.is_reading() for c in worker.client.connections if c.exchange]
            paused = bool(reading) and not any(reading)
            if paused:
                break
            await asyncio.sleep(0.001)
        assert paused
        assert generation.seen[0].fate == "running"
        assert (await response.read()).decode() == generation.events(skip=1)
    await no_connections(router)


async def test_deadline_passes_while_the_client_does_not_read(start_router: StartRouter, context, generation):
    generation.script.tokens = [str(n) for n in range(400)]
    generation.script.padding = 100_000
    router = await start_router(context, generation, config=Config(request_timeout_s=0.5))
    async with router.streaming(1, read_bufsize=1024):
        await generation.wait_fate("generation", "cancelled")
    await no_connections(router)
