"""F1, F19: what is between a context and a generation worker breaks while KV blocks are on the way over TCP.

The test, or a face before the context worker, gives the generation worker tickets that lead through a proxy.
"""

import asyncio
import secrets

import pytest
from fault_clients import COMPLETION, STORY, assert_same, body_of, session, stream
from fault_detour import Detour, through, ticket_of
from fault_mesh import OPTIONS

from diptych.transceiver.ticket import Ticket
from tests.fakes.tcp_proxy import TcpProxy

BODY = {"prompt": STORY * 20, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
FETCH_MS = 2000
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def far(fault_mesh):
    """A generation worker that fetches over TCP, and not for long."""
    transfer = {"backend": "TCP", "kv_transfer_timeout_ms": FETCH_MS}
    worker = fault_mesh.mesh.worker("far", "GENERATION", cache_transceiver_config=transfer, **OPTIONS)
    yield worker.wait_ready()
    worker.kill()


async def post(client, worker, params, **fields) -> dict:
    names = {"response_id": "cmpl-1", "created": 1, "disagg_request_id": secrets.token_hex(8)}
    body = {**BODY, **fields, "disaggregated_params": {**names, **params}}
    async with client.post(worker.url + COMPLETION, json=body) as response:
        assert response.status == 200, await response.text()
        return await response.json()


async def context_leg(client, worker) -> tuple[dict, Ticket]:
    answer = await post(client, worker, {"request_type": "context_only"}, cache_salt=secrets.token_hex(8))
    (choice,) = answer["choices"]
    return answer, ticket_of(choice["disaggregated_params"])


async def generation_leg(client, worker, answer, proxy: TcpProxy) -> str:
    (choice,) = answer["choices"]
    whole = await post(
        client,
        worker,
        {"request_type": "generation_only", "choices": [through(proxy, choice["disaggregated_params"])]},
        prompt_token_ids=answer["prompt_token_ids"],
        cache_salt=secrets.token_hex(8),
    )
    return whole["choices"][0]["text"]


async def text_alone(client, worker) -> str:
    async with client.post(worker.url + COMPLETION, json=BODY) as response:
        return (await response.json())["choices"][0]["text"]


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
async def test_context_worker_dies_in_the_middle_of_the_transfer(faults, far, part):
    victim = faults.contexts[0]
    fetches = far.metric("diptych_kv_fetches_total")
    async with session() as client:
        answer, ticket = await context_leg(client, victim)
        with TcpProxy(ticket.port) as proxy:
            proxy.cut_after = int(part * ticket.layout.block_bytes * len(ticket.block_ids))
            proxy.on_cut = victim.kill
            text = await generation_leg(client, far, answer, proxy)
        assert victim.process.poll() is not None
        assert far.metric("diptych_kv_fetches_total") == fetches
        assert text == await text_alone(client, far)
    faults.wait_rest(far)


@pytest.mark.parametrize(
    ("ways", "streamed"),
    [((), True), ((), False), (("up",), True), (("down",), True)],
    ids=["both ways", "both ways, no stream", "no way there", "no way back"],
)
async def test_the_network_between_them_falls_silent(faults, far, ways, streamed):
    """The prompt is computed again. What the generation worker cannot say to the context worker, the router says."""
    expected = await faults.expected("greedy", NUM_TOKENS)
    context = faults.contexts[0]
    fetches = far.metric("diptych_kv_fetches_total")
    async with Detour(context.url, ways) as detour, session() as client:
        router = await asyncio.to_thread(
            lambda: faults.mesh.router(f"detour{detour.port}", [detour], [far]).wait_ready()
        )
        try:
            path, body = body_of("greedy", NUM_TOKENS)
            if streamed:
                assert_same(await stream(client, router.url, (path, body)), expected)
            else:
                body.update(stream=False, stream_options=None)
                async with client.post(router.url + path, json=body) as response:
                    (choice,) = (await response.json())["choices"]
                assert choice["token_ids"] == expected.choices[0].token_ids
            assert detour.proxy is not None
            await asyncio.to_thread(faults.wait_rest, context)
            assert router.metric("released_tickets_total") == 1
            assert far.metric("diptych_kv_fetches_total") == fetches
        finally:
            router.kill()
