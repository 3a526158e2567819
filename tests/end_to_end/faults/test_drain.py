"""F14: SIGTERM. What runs finishes or moves, nothing new comes, the exit code is 0, and clients see nothing."""

import asyncio
import signal

from fault_clients import assert_same, body_of, session, stream
from fault_mesh import OPTIONS, roll_router, until

NUM_TOKENS = 60


async def test_sigterm_in_the_middle_of_a_stream(faults, sticky):
    """It finishes its stream; others go elsewhere meanwhile."""
    expected = await faults.expected("greedy", NUM_TOKENS)
    _, victim = await faults.owners(sticky)
    others = []

    async with session() as client:

        def on_event(number):
            if number == 5:
                victim.process.send_signal(signal.SIGTERM)
            if number == 8:
                for _ in range(3):
                    request = body_of("greedy", NUM_TOKENS)
                    others.append(
                        asyncio.create_task(stream(client, faults.router.url, request, headers=sticky))
                    )

        resumed = faults.router.metric("gen_resumed_streams_total")
        outcome = await stream(
            client, faults.router.url, body_of("greedy", NUM_TOKENS), headers=sticky, on_event=on_event
        )
        assert_same(outcome, expected)
        for other in await asyncio.gather(*others):
            assert_same(other, expected)
    assert await asyncio.to_thread(victim.process.wait, 20) == 0
    assert faults.router.metric("gen_resumed_streams_total") == resumed


async def test_streams_that_outlast_the_drain_move(faults):
    """A worker with half a second to drain."""
    hasty = faults.mesh.worker("hasty", "GENERATION", **{**OPTIONS, "drain_timeout_s": 0.5})
    router = faults.mesh.router("hasty_router", faults.contexts, [hasty])
    hasty.wait_ready()
    router.wait_ready()
    names = ["greedy", "seeded", "logprobs"]
    num_tokens = 120
    expected = {name: await faults.expected(name, num_tokens) for name in names}
    seen = dict.fromkeys(names, 0)

    async def one(client, name):
        def on_event(number):
            seen[name] = number
            if min(seen.values()) >= 3 and not signalled:
                signalled.append(True)
                hasty.process.send_signal(signal.SIGTERM)

        return await stream(client, router.url, body_of(name, num_tokens), on_event=on_event)

    signalled: list[bool] = []
    async with session() as client:
        outcomes = await asyncio.gather(*(one(client, name) for name in names))
    for name, outcome in zip(names, outcomes, strict=True):
        assert_same(outcome, expected[name])
    assert router.metric("gen_resumed_streams_total") == len(names)
    assert await asyncio.to_thread(hasty.process.wait, 20) == 0
    router.kill()


async def test_sigterm_of_a_context_worker_with_a_prefill_and_a_ticket(faults, sticky):
    """The ticket is waited for."""
    expected = await faults.expected("greedy", NUM_TOKENS)
    victim, generation = await faults.owners(sticky)
    faults.pause(generation)
    async with session() as client:
        call = asyncio.create_task(
            stream(client, faults.router.url, body_of("greedy", NUM_TOKENS), headers=sticky)
        )
        await until("the ticket", lambda: victim.blocks()["leased"] > 0)
        victim.process.send_signal(signal.SIGTERM)
        other = asyncio.create_task(stream(client, faults.router.url, body_of("greedy", NUM_TOKENS)))
        faults.resume(generation)
        assert_same(await call, expected)
        assert_same(await other, expected)
    assert await asyncio.to_thread(victim.process.wait, 20) == 0


async def test_every_worker_is_restarted_under_load(faults):
    """One after the other, and no client sees an error."""
    async with await faults.load("greedy", num_tokens=NUM_TOKENS) as load:
        await faults.roll_workers()
    print(f"{len(load.outcomes)} requests, longest stall {load.longest_stall_s:.2f} s")


async def test_every_router_process_is_replaced_under_load(faults):
    pair = faults.mesh.router("pair", [], [], metadata=faults.metadata, num_workers=2).wait_ready()
    faults.wait_known(pair)
    async with await faults.load("greedy", num_tokens=NUM_TOKENS, router=pair) as load:
        await roll_router(pair)
        await load.more(6)
    assert pair.stop() == 0
