"""Many requests at once through one context and one generation worker."""

import asyncio
import random

import aiohttp
from mesh import wait_for

NUM_REQUESTS = 64


async def one(session, url, number):
    rng = random.Random(number)
    words = [f"word{rng.randrange(500)}" for _ in range(rng.randrange(1, 120))]
    body = {
        "prompt": f"{number}: " + " ".join(words),
        "max_tokens": rng.randrange(1, 24),
        "temperature": rng.choice([0, 0.8]),
        "ignore_eos": True,
        "n": rng.choice([1, 1, 1, 2]),
        "stream": number % 2 == 0,
    }
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        text = await response.text()
        assert response.status == 200, text
    if body["stream"]:
        assert text.endswith("data: [DONE]\n\n") and '"error"' not in text
        assert text.count('"finish_reason":"length"') == body["n"]
        assert f'"completion_tokens":{body["max_tokens"] * body["n"]}' in text
    else:
        assert text.count('"finish_reason":"length"') == body["n"]
        assert f'"completion_tokens":{body["max_tokens"] * body["n"]}' in text


def at_rest(server):
    blocks = server.blocks()
    return blocks["active"] == blocks["leased"] == 0


async def test_64_concurrent_requests_all_end_and_blocks_are_conserved(servers):
    totals = {name: sum(servers[name].blocks().values()) for name in ("context", "shm")}
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=240)) as session:
        await asyncio.gather(
            *(one(session, servers["router_shm"].url, number) for number in range(NUM_REQUESTS))
        )
    for name, total in totals.items():
        wait_for(f"{name} at rest", lambda name=name: at_rest(servers[name]), 2.0)
        assert sum(servers[name].blocks().values()) == total


async def test_cancelled_requests_give_their_blocks_back(servers):
    async def cancelled(session, number):
        body = {"prompt": f"{number} story " * 150, "max_tokens": 400, "stream": True, "ignore_eos": True}
        async with session.post(f"{servers['router_shm'].url}/v1/completions", json=body) as response:
            async for _ in response.content:
                if number % 2:
                    return  # in the middle of the stream; the others wait for their deadline

    async with aiohttp.ClientSession() as session:
        calls = (asyncio.wait_for(cancelled(session, number), 0.2 + number / 10) for number in range(24))
        await asyncio.gather(*calls, return_exceptions=True)
    for name in ("context", "shm"):
        wait_for(f"{name} at rest", lambda name=name: at_rest(servers[name]), 2.0)
