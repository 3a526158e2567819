"""F18: twice as many requests at once as there are places: each is answered whole or told when to come back."""

import asyncio

import aiohttp
from fault_clients import assert_same, body_of, stream

NUM_TOKENS = 40
PLACES = 8  # half of them run, half wait
NUM_CLIENTS = 2 * PLACES
REQUESTS_EACH = 4


async def test_twice_the_load(faults):
    expected = await faults.expected("greedy", NUM_TOKENS)
    limits = {"max_concurrent_requests": PLACES // 2, "max_queued_requests": PLACES // 2}
    router = faults.mesh.router("narrow", [], [], metadata=faults.metadata, **limits).wait_ready()
    try:
        faults.wait_known(router)
        outcomes = []

        async def ask() -> None:
            """All on one connection: a refusal does not close it."""
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as client:
                for _ in range(REQUESTS_EACH):
                    outcomes.append(await stream(client, router.url, body_of("greedy", NUM_TOKENS)))

        await asyncio.gather(*(ask() for _ in range(NUM_CLIENTS)))
        refused = [outcome for outcome in outcomes if outcome.status == 429]
        served = [outcome for outcome in outcomes if outcome.status != 429]
        assert len(outcomes) == NUM_CLIENTS * REQUESTS_EACH
        assert len(served) >= PLACES
        assert len(refused) >= NUM_CLIENTS - PLACES
        for outcome in served:
            assert_same(outcome, expected)
        for outcome in refused:
            assert outcome.retry_after_s is not None and outcome.retry_after_s >= 1
            assert outcome.errors[0]["error"]["type"] == "rate_limit_error"
        assert router.metric("diptych_router_overload_refusals_total") == len(refused)
        assert faults.contexts[0].metric("trtllm_num_requests_waiting") == 0  # no line behind the line
    finally:
        router.kill()
