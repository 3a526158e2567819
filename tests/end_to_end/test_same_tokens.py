"""Greedy output through a context and a generation worker is the aggregated worker's, token for token."""

import asyncio
import secrets

import aiohttp
import pytest
from mesh import wait_for

LICENSE = (
    "Permission is granted to anyone to use this software for any purpose, including commercial applications, "
    "and to alter it and redistribute it freely, subject to the restrictions that follow. "
)
COMPLETIONS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):\n    ",
    "Der schnelle braune Fuchs springt über",
    "El cielo es azul porque",
    "日本の首都は",
    "Столица России — это",
    "2 + 2 = 4, 3 + 3 = 6, 4 + 4 =",
    "🙂🙃 emoji and ünïcödé text:",
    LICENSE * 3,
    LICENSE * 11,
    LICENSE * 24,
    LICENSE * 46,
    "A list of numbers: " + ", ".join(map(str, range(60))),
]
CHATS = [
    "What is the capital of France?",
    "Écris une phrase sur la mer.",
    "¿Cuántos días tiene una semana?",
    "Explain what a hash table is in two sentences.",
    "中国最长的河流是什么?",
    "Summarize this text: " + LICENSE * 20,
]
REQUESTS = [
    *[("/v1/completions", {"prompt": prompt}) for prompt in COMPLETIONS],
    *[("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}) for text in CHATS],
]
NUM_TOKENS = 20


async def generate(session, url, path, body, salt):
    request = {
        **body,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    async with session.post(url + path, json={**request, "cache_salt": salt}) as response:
        answer = await response.json()
        assert response.status == 200, answer
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens"]


async def all_tokens(url, *, together):
    """The tokens of every request; a salt of this call keeps it from using another call's cached blocks."""
    salt = secrets.token_hex(8)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=240)) as session:
        if together:
            return await asyncio.gather(
                *(generate(session, url, path, body, salt) for path, body in REQUESTS)
            )
        return [await generate(session, url, path, body, salt) for path, body in REQUESTS]


@pytest.fixture(scope="module")
def expected(servers):
    return asyncio.run(all_tokens(servers["aggregated"].url, together=False))


def test_prompts_span_the_lengths(expected):
    lengths = [num_prompt for _, num_prompt in expected]
    assert len(lengths) == 20 and min(lengths) <= 6 and 1450 <= max(lengths) <= 1560


@pytest.mark.parametrize("together", [False, True], ids=["alone", "batched"])
@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_disaggregated_equals_aggregated(servers, expected, transport, together):
    before = servers[transport].metric("diptych_kv_fetches_total")
    assert await all_tokens(servers[f"router_{transport}"].url, together=together) == expected
    assert servers[transport].metric("diptych_kv_fetches_total") == before + len(REQUESTS)


@pytest.mark.parametrize("together", [False, True], ids=["alone", "batched"])
async def test_generation_first_equals_aggregated(servers, expected, together):
    worker, router = servers["shm"], servers["router_early"]
    handovers, ahead = (
        worker.metric("diptych_handovers_total"),
        worker.metric("diptych_kv_blocks_fetched_ahead_total"),
    )
    assert await all_tokens(router.url, together=together) == expected
    assert worker.metric("diptych_handovers_total") == handovers + len(REQUESTS)
    assert worker.metric("diptych_kv_blocks_fetched_ahead_total") > ahead
    assert router.metric("gen_retry_requests_total") == 0


async def test_batched_equals_alone(servers, expected):
    assert await all_tokens(servers["aggregated"].url, together=True) == expected


async def test_the_transports_were_the_ones_asked_for(servers, expected):
    async with aiohttp.ClientSession() as session:
        for transport in ("shm", "tcp"):
            url = servers[f"router_{transport}"].url
            await generate(session, url, "/v1/completions", {"prompt": "hello there"}, secrets.token_hex(4))
            async with session.get(f"{servers[transport].url}/perf_metrics") as response:
                entries = await response.json()
            assert entries[-1]["transport"] == transport
            assert entries[-1]["wire_bytes"] > 0


async def test_a_cached_prefix_changes_nothing(servers, expected):
    salt = secrets.token_hex(8)
    path, body = REQUESTS[12]
    async with aiohttp.ClientSession() as session:
        for _ in range(3):
            assert await generate(session, servers["router_shm"].url, path, body, salt) == expected[12]


async def test_a_prompt_that_is_cached_whole_has_its_ticket_done(servers):
    """The generation worker copies nothing and says that the ticket is done: the router has nothing to return."""
    context, worker, router = servers["context"], servers["shm"], servers["router_shm"]
    prompt = {"prompt": list(range(1000, 1064))}  # whole blocks
    async with aiohttp.ClientSession() as session:
        answers = [await generate(session, router.url, "/v1/completions", prompt, "whole")]
        wait_for("the first ticket is done", lambda: context.blocks()["leased"] == 0, 10)
        returned = router.metric("released_tickets_total")
        fetched = worker.metric("diptych_kv_fetch_bytes_total")
        answers += [await generate(session, router.url, "/v1/completions", prompt, "whole") for _ in range(2)]
    assert answers[0] == answers[1] == answers[2]
    assert worker.metric("diptych_kv_fetch_bytes_total") == fetched
    assert router.metric("released_tickets_total") == returned
    wait_for("all tickets are done", lambda: context.blocks()["leased"] == 0, 10)
