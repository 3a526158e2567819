"""F16: two workers change roles under load, and back; what runs there finishes there."""

from fault_clients import session
from fault_mesh import until

NUM_TOKENS = 24


async def change(worker, role: str) -> None:
    async with session() as client, client.post(worker.url + "/role", json={"role": role}) as response:
        assert response.status == 200
        assert (await response.json())["role"] == role


async def flip(faults, *roles: str) -> None:
    workers = (faults.contexts[1], faults.generations[1])
    for worker, role in zip(workers, roles, strict=True):
        await change(worker, role)
        await until(f"{worker.name} {role}", lambda worker=worker, role=role: faults.role(worker) == role)


async def test_roles_are_changed_under_load(faults):
    counters = ("gen_resumed_streams_total", "gen_retry_requests_total", "ctx_retry_requests_total")
    before = [faults.router.metric(name) for name in counters]
    flipped = faults.contexts[1]
    async with await faults.load("greedy", "seeded", num_tokens=NUM_TOKENS) as load:
        try:
            await flip(faults, "GENERATION", "CONTEXT")
            fetches = flipped.metric("diptych_kv_fetches_total")
            await load.more(8)
            assert flipped.metric("diptych_kv_fetches_total") > fetches
        finally:
            await flip(faults, "CONTEXT", "GENERATION")
        await load.more(8)
    assert [faults.router.metric(name) for name in counters] == before


async def test_an_unknown_role_is_refused(faults):
    async with session() as client:
        url = faults.contexts[0].url + "/role"
        for body in ({"role": "context"}, {}, ["CONTEXT"]):
            async with client.post(url, json=body) as response:
                assert response.status == 400
                assert "GENERATION" in (await response.json())["error"]["message"]
    assert faults.role(faults.contexts[0]) == "CONTEXT"
