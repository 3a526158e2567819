"""Clients that go away or do not read, in each leg: the legs end, the tickets are returned."""

import asyncio

from tests.router.conftest import STREAM, WHOLE, Config, StartRouter, no_connections


async def test_client_gone_during_the_context_leg(start_router: StartRouter, context, generation):
    context.script.hold["context"] = asyncio.Event()
    router = await start_router(context, generation)
    request = asyncio.create_task(router.text(STREAM))
    await context.wait_for(lambda: context.legs("context"))
    request.cancel()
    await context.wait_fate("context", "cancelled")
    await no_connections(router)
    assert await router.metric("cancelled_requests_total") == 1


async def test_client_gone_before_generation_answers_returns_tickets(
    start_router: StartRouter, context, generation
):
    generation.script.hold["generation"] = asyncio.Event()
    router = await start_router(context, generation)
    request = asyncio.create_task(router.text(WHOLE))
    await generation.wait_for(lambda: generation.legs("generation"))
    request.cancel()
    await generation.wait_fate("generation", "cancelled")
    await context.wait_for(lambda: context.released == ["c0-ticket-1"])
    await no_connections(router)


async def test_client_gone_in_the_middle_of_the_stream(start_router: StartRouter, context, generation):
    generation.script.hold_after[2] = asyncio.Event()
    router = await start_router(context, generation)
    async with router.post(STREAM) as response:
        await response.content.readuntil(b"\n\n")
        await response.content.readuntil(b"\n\n")
        response.close()
    await generation.wait_fate("generation", "cancelled")
    await no_connections(router)


async def test_slow_client_holds_the_worker_back(start_router: StartRouter, context, generation):
    """The router buffers a bounded part of what a client does not read, and loses none of it."""
    generation.script.tokens = [str(n) for n in range(400)]
    generation.script.padding = 100_000
    router = await start_router(context, generation)
    async with router.post(STREAM, read_bufsize=1024) as response:
        await response.content.readuntil(b"\n\n")
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
    async with router.post(STREAM, read_bufsize=1024) as response:
        await response.content.readuntil(b"\n\n")
        await generation.wait_fate("generation", "cancelled")
    await no_connections(router)
