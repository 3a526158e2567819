"""F1, F19: what is between a context and a generation worker breaks while KV blocks are on the way over TCP.

The test is the router: it gives the generation worker a ticket that leads through a proxy.
"""

import base64
import secrets

import msgspec
import pytest
from fault_clients import COMPLETION, STORY, session
from fault_mesh import OPTIONS

from diptych.transceiver import ticket as tickets
from diptych.transceiver.wires import StreamRegion
from tests.fakes.tcp_proxy import TcpProxy

BODY = {"prompt": STORY * 20, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
FETCH_MS = 2000
LEASE_S = 30.0


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


async def context_leg(client, worker) -> tuple[dict, tickets.Ticket]:
    answer = await post(client, worker, {"request_type": "context_only"}, cache_salt=secrets.token_hex(8))
    (choice,) = answer["choices"]
    return answer, tickets.decode(base64.b64decode(choice["disaggregated_params"]["encoded_opaque_state"]))


async def generation_leg(client, worker, answer: dict, ticket: tickets.Ticket, proxy: TcpProxy) -> str:
    region = msgspec.msgpack.decode(ticket.transports["tcp"], type=StreamRegion)
    region = msgspec.structs.replace(region, port=proxy.port)
    detour = msgspec.structs.replace(
        ticket, port=proxy.port, transports={"tcp": msgspec.msgpack.encode(region)}
    )
    (choice,) = answer["choices"]
    state = base64.b64encode(tickets.encode(detour)).decode()
    params = {**choice["disaggregated_params"], "encoded_opaque_state": state}
    whole = await post(
        client,
        worker,
        {"request_type": "generation_only", "choices": [params]},
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
            text = await generation_leg(client, far, answer, ticket, proxy)
        assert victim.process.poll() is not None
        assert far.metric("diptych_kv_fetches_total") == fetches
        assert text == await text_alone(client, far)
    faults.wait_rest(far)


@pytest.mark.parametrize("ways", [(), ("up",), ("down",)], ids=["both ways", "no way there", "no way back"])
async def test_the_network_between_them_falls_silent(faults, far, ways):
    """The prompt is computed again; the held blocks come back with the word that gets through, or their lease ends."""
    context = faults.contexts[0]
    fetches = far.metric("diptych_kv_fetches_total")
    async with session() as client:
        answer, ticket = await context_leg(client, context)
        with TcpProxy(ticket.port) as proxy:
            proxy.silence(*ways)
            text = await generation_leg(client, far, answer, ticket, proxy)
            assert text == await text_alone(client, far)
            assert far.metric("diptych_kv_fetches_total") == fetches
            proxy.heal()
            faults.wait_rest(context, timeout_s=LEASE_S + 15.0)
