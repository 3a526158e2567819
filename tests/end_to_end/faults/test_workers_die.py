"""F1, F2, F6: kill -9 of context and generation workers in every phase, and restarts on the same port."""

import asyncio

import pytest
from fault_clients import BODIES, CHAT, COMPLETION, STORY, assert_same, body_of, session, stream
from fault_mesh import until
from mesh import Server

NUM_TOKENS = 40


async def test_generation_worker_dies_in_the_middle_of_streams(faults, sticky):
    """One stream of each kind runs on the worker; it dies at the fifth event of the first one."""
    expected = {name: await faults.expected(name, NUM_TOKENS) for name in BODIES}
    _, victim = await faults.owners(sticky)
    started = {name: asyncio.Event() for name in BODIES}

    async def one(client, name):
        def on_event(number):
            if number == 5:
                started[name].set()
                if all(event.is_set() for event in started.values()):
                    victim.kill()

        return await stream(
            client, faults.router.url, body_of(name, NUM_TOKENS), headers=sticky, on_event=on_event
        )

    async with session() as client:
        outcomes = await asyncio.gather(*(one(client, name) for name in BODIES))
    assert victim.process.poll() is not None
    for name, outcome in zip(BODIES, outcomes, strict=True):
        assert_same(outcome, expected[name])
    assert faults.state(victim) == "DOWN"


@pytest.mark.parametrize(
    ("at", "kill"), [(1, Server.kill), (20, Server.kill_engine), (NUM_TOKENS - 1, Server.kill)]
)
async def test_generation_worker_dies_at_a_token(faults, sticky, at, kill):
    """At its first step, with its HTTP process left alive to break off the stream, and before its last token."""
    expected = await faults.expected("greedy", NUM_TOKENS)
    _, victim = await faults.owners(sticky)

    def on_event(number):
        if number == at:
            kill(victim)

    async with session() as client:
        outcome = await stream(
            client, faults.router.url, body_of("greedy", NUM_TOKENS), headers=sticky, on_event=on_event
        )
    assert_same(outcome, expected)
    assert await asyncio.to_thread(victim.process.wait, 10) != 0


async def test_generation_worker_dies_while_it_waits_for_kv(faults, sticky):
    expected = await faults.expected("seeded", NUM_TOKENS)
    context, victim = await faults.owners(sticky)
    faults.pause(victim)  # so that it does not fetch
    async with session() as client:
        call = asyncio.create_task(
            stream(client, faults.router.url, body_of("seeded", NUM_TOKENS), headers=sticky)
        )
        await until("the ticket", lambda: context.blocks()["leased"] > 0)
        victim.kill()
        faults.paused.discard(victim)
        assert_same(await call, expected)
    faults.wait_rest(context)


async def test_all_generation_workers_die(faults, sticky):
    """Any worker that is READY may finish the request."""
    expected = await faults.expected("greedy", NUM_TOKENS)

    def on_event(number):
        if number == 6:
            for worker in faults.generations:
                worker.kill()

    async with session() as client:
        outcome = await stream(
            client, faults.router.url, body_of("greedy", NUM_TOKENS), headers=sticky, on_event=on_event
        )
        assert_same(outcome, expected)
        # The router told the truth, and goes on with what it has.
        async with client.get(faults.router.url + "/health") as response:
            assert response.status == 503
        assert_same(await stream(client, faults.router.url, body_of("greedy", NUM_TOKENS)), expected)


async def test_whole_requests_go_on_when_there_are_no_context_workers(faults, sticky):
    """Both legs on one generation worker, which dies too."""
    names = ["chat with stop", "seeded", "echo, two prompts"]
    expected = {name: await faults.expected(name, NUM_TOKENS) for name in names}
    _, victim = await faults.owners(sticky)
    for worker in faults.contexts:
        worker.kill()
    seen = dict.fromkeys(names, 0)

    async def one(client, name):
        def on_event(number):
            seen[name] = number
            if min(seen.values()) >= 6 and victim.process.poll() is None:
                victim.kill()

        return await stream(
            client, faults.router.url, body_of(name, NUM_TOKENS), headers=sticky, on_event=on_event
        )

    async with session() as client:
        outcomes = await asyncio.gather(*(one(client, name) for name in names))
    assert victim.process.poll() is not None
    for name, outcome in zip(names, outcomes, strict=True):
        assert_same(outcome, expected[name])


async def test_context_worker_dies_with_prefills_running_and_queued(faults, sticky):
    expected = await faults.expected("greedy", NUM_TOKENS)
    victim, _ = await faults.owners(sticky)
    await faults.end_probation(sticky)
    requests = [body_of("greedy", 8, prompt=f"{number} {STORY}" * 200) for number in range(4)]

    async with session() as client:
        calls = [
            asyncio.create_task(stream(client, faults.router.url, request, headers=sticky))
            for request in requests
        ]
        await until(
            "prefills running and queued",
            lambda: (
                victim.metric("trtllm_num_requests_running") + victim.metric("trtllm_num_requests_waiting")
                == 4
            ),
        )
        victim.kill()
        outcomes = await asyncio.gather(*calls)
        again = [await stream(client, faults.router.url, request) for request in requests]
        for outcome, same in zip(outcomes, again, strict=True):
            assert same.errors == []
            assert outcome.dones == 1
            assert outcome.choices == same.choices
        assert_same(await stream(client, faults.router.url, body_of("greedy", NUM_TOKENS)), expected)


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
async def test_context_worker_dies_before_its_ticket_is_fetched(faults, sticky, path):
    name = "greedy" if path == COMPLETION else "chat with stop"
    expected = await faults.expected(name, NUM_TOKENS)
    victim, generation = await faults.owners(sticky)
    faults.pause(generation)
    async with session() as client:
        call = asyncio.create_task(
            stream(client, faults.router.url, body_of(name, NUM_TOKENS), headers=sticky)
        )
        await until("the ticket", lambda: victim.blocks()["leased"] > 0)
        victim.kill()
        faults.resume(generation)
        assert_same(await call, expected)


async def test_context_worker_dies_after_its_ticket_was_fetched(faults, sticky):
    """Nobody needs it any more."""
    expected = await faults.expected("greedy", NUM_TOKENS)
    victim, _ = await faults.owners(sticky)
    resumed = faults.router.metric("gen_resumed_streams_total")

    def on_event(number):
        if number == 5:
            victim.kill()

    async with session() as client:
        outcome = await stream(
            client, faults.router.url, body_of("greedy", NUM_TOKENS), headers=sticky, on_event=on_event
        )
    assert_same(outcome, expected)
    assert faults.router.metric("gen_resumed_streams_total") == resumed


async def test_context_worker_restarts_on_its_port(faults, sticky):
    """The generation worker had connections to the old process: it must not mistake the new one for it."""
    expected = await faults.expected("greedy", NUM_TOKENS)
    victim, generation = await faults.owners(sticky)
    victim.kill()
    victim.start().wait_ready()
    faults.wait_state(victim, "READY")
    again = await faults.session_of(victim, generation)
    fetches = generation.metric("diptych_kv_fetches_total")
    async with session() as client:
        outcome = await stream(client, faults.router.url, body_of("greedy", NUM_TOKENS), headers=again)
    assert_same(outcome, expected)
    assert generation.metric("diptych_kv_fetches_total") == fetches + 1


async def test_generation_worker_restarts_on_its_port(faults, sticky):
    expected = await faults.expected("greedy", NUM_TOKENS)
    context, victim = await faults.owners(sticky)
    victim.kill()
    victim.start().wait_ready()
    faults.wait_state(victim, "READY")
    again = await faults.session_of(context, victim)
    fetches = victim.metric("diptych_kv_fetches_total")
    async with session() as client:
        outcome = await stream(client, faults.router.url, body_of("greedy", NUM_TOKENS), headers=again)
    assert_same(outcome, expected)
    assert victim.metric("diptych_kv_fetches_total") == fetches + 1
    faults.wait_rest(context)
