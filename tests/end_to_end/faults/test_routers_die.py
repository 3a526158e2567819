"""F4: kill -9 of a router. Its streams end, the workers forget them at once; another router never notices."""

import asyncio

import aiohttp
import pytest
from fault_clients import assert_same, body_of, session, stream
from fault_mesh import until

NUM_TOKENS = 60


async def test_a_router_dies_in_the_middle_of_streams(faults):
    expected = await faults.expected("seeded", NUM_TOKENS)
    other = faults.mesh.router("other_router", faults.contexts, faults.generations).wait_ready()
    faults.wait_known(other)
    seen = {"victim": 0, "other": 0}

    async def one(client, name, url, request):
        def on_event(number):
            seen[name] = number
            if min(seen.values()) >= 5 and faults.router.process.poll() is None:
                faults.router.kill()

        return await stream(client, url, request, on_event=on_event)

    async with session() as client:
        lost = asyncio.create_task(one(client, "victim", faults.router.url, body_of("greedy", 600)))
        kept = await one(client, "other", other.url, body_of("seeded", NUM_TOKENS))
        assert_same(kept, expected)
        with pytest.raises(aiohttp.ClientError):
            await lost
        faults.wait_rest()
        assert_same(await stream(client, other.url, body_of("seeded", NUM_TOKENS)), expected)
    other.kill()


async def test_a_router_dies_during_a_prefill(faults, sticky):
    context, _ = await faults.owners(sticky)
    request = body_of("greedy", 8, prompt="word " * 6000)
    async with session() as client:
        call = asyncio.create_task(stream(client, faults.router.url, request, headers=sticky))
        await until("the prefill", lambda: context.metric("trtllm_num_requests_running") == 1)
        faults.router.kill()
        with pytest.raises(aiohttp.ClientError):
            await call
    faults.wait_rest()
