"""F19: a network that loses everything, in one direction or both, or cuts: between the router and a worker, between
context and generation worker, between workers and etcd; health tells the truth."""

from contextlib import ExitStack

import pytest
from fault_clients import assert_same, body_of, session, stream
from fault_mesh import KEYS, until
from mesh import Server, wait_for

from tests.fakes.tcp_proxy import TcpProxy

NUM_TOKENS = 100
STALL_S = 30.0  # found by probes, on a busy machine, and not by the idle limit of 60 s


class Wire:
    """A router whose way to two of the workers, one of each role, leads through proxies: it has a list of urls."""

    def __init__(self, faults, name: str, stack: ExitStack) -> None:
        self._faults = faults
        behind = (faults.contexts[0], faults.generations[0])
        self.context, self.generation = (stack.enter_context(TcpProxy(server.port)) for server in behind)
        self.router: Server = faults.mesh.router(
            name, [self.context, faults.contexts[1]], [self.generation, faults.generations[1]]
        )
        stack.callback(self.router.kill)
        self.router.wait_ready()
        for proxy in (self.context, self.generation):
            self.wait_state(proxy, "READY")
        for server in (faults.contexts[1], faults.generations[1]):
            faults.wait_state(server, "READY", router=self.router)

    def wait_state(self, proxy: TcpProxy, state: str) -> None:
        wait_for(
            f"the worker behind port {proxy.port} {state}",
            lambda: self._faults.state(proxy, self.router) == state,
            20.0,
        )


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


async def test_router_and_generation_worker(faults, stack):
    expected = await faults.expected("greedy", NUM_TOKENS)
    wire = Wire(faults, "router_far_from_generation", stack)
    proxy = wire.generation
    headers = await faults.session_of(faults.contexts[1], faults.generations[0], wire.router)
    breaks = (proxy.silence, lambda: proxy.silence("down"), proxy.cut)
    async with session() as client:
        for num_resumed, fault in enumerate(breaks, 1):
            outcome = await stream(
                client,
                wire.router.url,
                body_of("greedy", NUM_TOKENS),
                headers=headers,
                on_event=lambda number, fault=fault: fault() if number == 6 else None,
            )
            assert_same(outcome, expected)
            assert outcome.stall_s < STALL_S
            assert wire.router.metric("gen_resumed_streams_total") == num_resumed
            if fault != proxy.cut:
                wire.wait_state(proxy, "DOWN")
                faults.wait_rest(*faults.contexts)
            proxy.heal()
            wire.wait_state(proxy, "READY")


async def test_router_and_context_worker(faults, stack):
    expected = await faults.expected("greedy", NUM_TOKENS)
    wire = Wire(faults, "router_far_from_context", stack)
    proxy = wire.context
    headers = await faults.session_of(faults.contexts[0], faults.generations[1], wire.router)
    async with session() as client:

        async def ask() -> None:
            request = body_of("greedy", NUM_TOKENS)
            assert_same(await stream(client, wire.router.url, request, headers=headers), expected)

        for ways in ((), ("down",)):
            proxy.silence(*ways)
            await ask()
            wire.wait_state(proxy, "DOWN")
            proxy.heal()
            wire.wait_state(proxy, "READY")
        proxy.refuses = True
        proxy.cut()
        await ask()
    assert wire.router.metric("ctx_retry_requests_total") == 3


async def test_one_worker_and_etcd(faults, sticky):
    """It gets nothing new when its key has ended, what runs there goes on, and it is back by itself."""
    expected = await faults.expected("greedy", NUM_TOKENS)
    _, victim = await faults.owners(sticky)
    link = faults.etcd_links[victim]
    resumed = faults.router.metric("gen_resumed_streams_total")
    async with session() as client:

        def on_event(number):
            if number == 5:
                link.silence()
                faults.end_lease(victim)

        call = stream(
            client, faults.router.url, body_of("greedy", NUM_TOKENS), headers=sticky, on_event=on_event
        )
        assert_same(await call, expected)
        assert not faults.is_announced(victim)
        faults.wait_state(victim, "DOWN")
        assert_same(await stream(client, faults.router.url, body_of("greedy", NUM_TOKENS)), expected)
    link.heal()
    faults.wait_state(victim, "READY")
    assert faults.router.metric("gen_resumed_streams_total") == resumed


@pytest.mark.parametrize("ways", [(), ("down",)], ids=["both ways", "no way back"])
async def test_all_workers_and_etcd(faults, ways):
    """The registry empties: the router keeps who still answers."""
    async with await faults.load("greedy", num_tokens=40) as load:
        for link in faults.etcd_links.values():
            link.silence(*ways)
        faults.etcd.end_leases(KEYS)
        await load.more(6)
        assert faults.announced() == []
        for link in faults.etcd_links.values():
            link.heal()
        await until("all keys", lambda: all(map(faults.is_announced, faults.workers)))
        await load.more(4)
