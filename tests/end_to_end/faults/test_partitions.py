"""F19: a network that loses everything, or cuts, between the router and one worker; health tells the truth."""

from contextlib import ExitStack

import pytest
from fault_clients import assert_same, body_of, session, stream
from mesh import Server, wait_for

from tests.fakes.tcp_proxy import TcpProxy

NUM_TOKENS = 60
STALL_S = 6.0


class Wire:
    """A router whose way to two of the workers, one of each role, leads through proxies."""

    def __init__(self, faults, name: str, stack: ExitStack) -> None:
        behind = (faults.contexts[0], faults.generations[0])
        self.context, self.generation = (stack.enter_context(TcpProxy(server.port)) for server in behind)
        context, generation = (_Behind(proxy) for proxy in (self.context, self.generation))
        self.router: Server = faults.mesh.router(
            name, [context, faults.contexts[1]], [generation, faults.generations[1]]
        )
        stack.callback(self.router.kill)
        self.router.wait_ready()
        for proxy in (self.context, self.generation):
            self.wait_state(faults, proxy, "READY")
        for server in (faults.contexts[1], faults.generations[1]):
            faults.wait_state(server, "READY", router=self.router)

    def wait_state(self, faults, proxy: TcpProxy, state: str) -> None:
        url = f"http://127.0.0.1:{proxy.port}"
        wait_for(f"{url} {state}", lambda: faults.states(self.router).get(url) == state, 20.0)


class _Behind:
    def __init__(self, proxy: TcpProxy) -> None:
        self.port = proxy.port


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


async def test_router_and_generation_worker(faults, stack):
    expected = await faults.expected("seeded", NUM_TOKENS)
    wire = Wire(faults, "router_far_from_generation", stack)
    proxy = wire.generation
    breaks = {"silence": proxy.silence, "cut": proxy.cut}
    async with session() as client:
        for name, fault in breaks.items():
            for _ in range(2):  # round robin: one of the two goes through the proxy
                outcome = await stream(
                    client,
                    wire.router.url,
                    body_of("seeded", NUM_TOKENS),
                    on_event=lambda number, fault=fault: fault() if number == 6 else None,
                )
                assert_same(outcome, expected)
                assert outcome.stall_s < STALL_S
            if name == "silence":
                wire.wait_state(faults, proxy, "DOWN")
                assert_same(await stream(client, wire.router.url, body_of("seeded", NUM_TOKENS)), expected)
                faults.wait_rest(*faults.contexts)
            proxy.heal()
            wire.wait_state(faults, proxy, "READY")
    assert wire.router.metric("gen_resumed_streams_total") >= 2


async def test_router_and_context_worker(faults, stack):
    expected = await faults.expected("greedy", NUM_TOKENS)
    wire = Wire(faults, "router_far_from_context", stack)
    proxy = wire.context
    proxy.silence()
    async with session() as client:
        for _ in range(2):
            assert_same(await stream(client, wire.router.url, body_of("greedy", NUM_TOKENS)), expected)
        wire.wait_state(faults, proxy, "DOWN")
        proxy.heal()
        wire.wait_state(faults, proxy, "READY")
        proxy.refuses = True
        proxy.cut()
        for _ in range(2):
            assert_same(await stream(client, wire.router.url, body_of("greedy", NUM_TOKENS)), expected)
