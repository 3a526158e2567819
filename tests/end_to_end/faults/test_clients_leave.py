"""F7, F8, F9: clients that leave in each phase, legs that are refused, releases that come twice or for nothing."""

import asyncio
import random
import secrets
from typing import Any

import pytest
from fault_clients import STORY, assert_same, body_of, session, stream
from fault_mesh import OPTIONS, until
from mesh import get

NUM_TOKENS = 40
PROBE_S = 2.0
BUSY_S = 3.0  # for a machine with other work


async def leave(call: asyncio.Task) -> None:
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)


async def test_during_the_prefill(faults, sticky):
    context, _ = await faults.owners(sticky)
    async with session() as client:
        request = body_of("greedy", 8, prompt=STORY * 600)
        call = asyncio.create_task(stream(client, faults.router.url, request, headers=sticky))
        await until("the prefill", lambda: context.metric("trtllm_num_requests_running") == 1)
        await leave(call)
        faults.wait_rest(context)


@pytest.mark.parametrize("streamed", [True, False])
async def test_between_the_legs(faults, sticky, streamed):
    """The generation worker has not fetched: the router returns the blocks, while that worker hangs."""
    context, generation = await faults.owners(sticky)
    faults.pause(generation)
    async with session() as client:
        request = body_of("greedy", 8)
        if not streamed:
            request[1].update(stream=False)
            del request[1]["stream_options"]
        call = asyncio.create_task(stream(client, faults.router.url, request, headers=sticky))
        await until("the ticket", lambda: context.blocks()["leased"] > 0)
        await leave(call)
        faults.wait_rest(context)
    faults.resume(generation)
    faults.wait_rest(generation)


@pytest.mark.parametrize("first", ["answer", "leave"])
async def test_in_the_turn_in_which_the_context_answer_arrives(faults, sticky, first):
    """The router finds both at once, the answer with its ticket and the client's leave."""
    context, _ = await faults.owners(sticky)
    for _ in range(3):
        legs = faults.router.metric("ctx_total_requests_total")
        faults.pause(context)
        async with session() as client:
            call = asyncio.create_task(
                stream(client, faults.router.url, body_of("greedy", 8), headers=sticky)
            )
            await until("the leg", lambda legs=legs: faults.router.metric("ctx_total_requests_total") > legs)
            faults.pause(faults.router)
            if first == "leave":
                await leave(call)
            faults.resume(context)
            await until("the ticket", lambda: context.blocks()["leased"] > 0)
            await leave(call)
        faults.resume(faults.router)
        faults.wait_rest()


async def test_in_the_middle_of_streams(faults):
    async with session() as client:
        left = asyncio.Event()

        def on_event(number):
            if number == 10:
                left.set()

        calls = [
            asyncio.create_task(stream(client, faults.router.url, body_of("seeded", 500), on_event=on_event))
            for _ in range(4)
        ]
        await left.wait()
        for call in calls:
            await leave(call)
    faults.wait_rest()


async def storm(faults, *, clients: int, num_prompt: int, rounds: int, seed: int) -> dict[str, Any]:
    """Clients that leave at random moments, all phases among them; then an ordinary request, at once."""
    loop = asyncio.get_running_loop()
    probes_s: list[float] = []
    rests_s: list[float] = []
    expected = await faults.expected("greedy", 8)
    rng = random.Random(seed)
    faults.wait_rest()
    free = {worker: worker.blocks() for worker in faults.workers}
    legs = faults.router.metric("ctx_total_requests_total")
    for _ in range(rounds):
        async with session() as client:
            calls = [
                asyncio.create_task(
                    stream(client, faults.router.url, body_of("greedy", 100, prompt="word " * num_prompt))
                )
                for _ in range(clients)
            ]
            _, pending = await asyncio.wait(calls, timeout=rng.uniform(0.5, 2.0))
            for call in pending:
                call.cancel()
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            broken = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
            assert not broken, broken[:3]
        async with session() as client:
            asked = loop.time()
            probe = await asyncio.wait_for(
                stream(client, faults.router.url, body_of("greedy", 8)), PROBE_S + BUSY_S
            )
            probes_s.append(round(loop.time() - asked, 3))
            assert_same(probe, expected)
        answered = loop.time()
        faults.wait_rest()
        rests_s.append(round(loop.time() - answered, 3))
    legs = faults.router.metric("ctx_total_requests_total") - legs
    assert legs > clients * rounds / 2, "the storm did not reach the workers"
    after = {worker: worker.blocks() for worker in faults.workers}
    for worker, before in free.items():
        assert available(after[worker]) == available(before)
    return {
        "clients": clients,
        "prompt_words": num_prompt,
        "rounds": rounds,
        "context_legs": legs,
        "probe_s": probes_s,
        "blocks_back_after_the_probe_s": rests_s,
        "blocks_before": {worker.name: available(blocks) for worker, blocks in free.items()},
        "blocks_after": {worker.name: available(blocks) for worker, blocks in after.items()},
    }


def available(blocks: dict[str, float]) -> float:
    return blocks["free"] + blocks["cached"]


async def test_a_storm_of_cancels(faults):
    await storm(faults, clients=40, num_prompt=300, rounds=3, seed=1)


@pytest.mark.slow
async def test_a_great_storm_of_cancels(faults, record):
    """NVIDIA/TensorRT-LLM#12313: the pool stayed full, and the server answered 200 to its health check for ever."""
    record("cancel_storm", **await storm(faults, clients=300, num_prompt=2000, rounds=4, seed=2))


async def test_a_generation_worker_refuses_what_the_context_worker_took(faults):
    """Its limits are smaller: the client has its error, and the tickets are returned at once."""
    small = faults.mesh.worker("small", "GENERATION", **{**OPTIONS, "max_seq_len": 64})
    router = faults.mesh.router("small_router", faults.contexts, [small])
    small.wait_ready()
    router.wait_ready()
    request = body_of("greedy", 8, prompt="word " * 200)
    try:
        async with session() as client:
            outcome = await stream(client, router.url, request)
            (error,) = outcome.errors
            assert error["error"]["code"] == "context_length_exceeded"
            assert outcome.dones == 1
            request[1].update(stream=False)
            del request[1]["stream_options"]
            assert (await stream(client, router.url, request)).status == 400
        faults.wait_rest(*faults.contexts)
    finally:
        router.kill()
        small.kill()


async def test_releases_that_come_twice_late_or_for_nothing(faults, sticky):
    expected = await faults.expected("greedy", NUM_TOKENS)
    context, _ = await faults.owners(sticky)
    async with session() as client:
        outcome = await stream(client, faults.router.url, body_of("greedy", NUM_TOKENS), headers=sticky)
        assert_same(outcome, expected)
        for what in ({"ticket_ids": ["no such ticket"]}, {"disagg_request_ids": ["no such request", 7]}, {}):
            for _ in range(2):
                async with client.post(context.url + "/kv/release", json=what) as response:
                    assert response.status == 200
        async with client.post(context.url + "/kv/release", json={"ticket_ids": [1]}) as response:
            assert response.status == 400
        outcome = await stream(client, faults.router.url, body_of("greedy", NUM_TOKENS), headers=sticky)
        assert_same(outcome, expected)


async def test_a_release_that_is_meant_for_another_process_returns_nothing(faults):
    context = faults.contexts[0]
    key = secrets.token_hex(8)
    names = {"response_id": "cmpl-1", "created": 1, "disagg_request_id": key}
    path, body = body_of("greedy", 8)
    body.update(stream=False, stream_options=None)
    async with session() as client:

        async def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
            async with client.post(context.url + path, json=body) as response:
                assert response.status == 200
                return await response.json()

        info = get(context.url + "/server_info")
        await post(path, {**body, "disaggregated_params": {"request_type": "context_only", **names}})
        other = {"disagg_request_ids": [key], "incarnation": "another"}
        assert await post("/kv/release", other) == {"released": 0}
        this = {"disagg_request_ids": [key], "incarnation": info["incarnation"]}
        assert await post("/kv/release", this) == {"released": 1}
    faults.wait_rest(context)
