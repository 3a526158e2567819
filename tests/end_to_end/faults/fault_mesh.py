"""One mesh for all fault tests: two context and two generation workers and a router, which find each other in a
real etcd. Each worker reaches etcd through a proxy of its own; the router asks etcd itself.

A test breaks what it likes. Afterwards the mesh is mended (only what was killed is started again), and the
invariants are asserted: blocks conserved and at rest on every living worker, health truthful, requests work.
"""

import asyncio
import os
import secrets
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import orjson
from fault_clients import Load, Outcome, body_of, session, stream
from mesh import Mesh, Server, get, wait_for

from tests.fakes.tcp_proxy import TcpProxy

# One thread each, for machines with two cores; a pool whose size does not depend on who else needs memory.
OPTIONS = {"num_threads": 1, "drain_timeout_s": 30, "kv_cache_config": {"max_tokens": 8192}}
KEYS = "/trtllm/default/workers/"
# Blocks are back so soon after the last request or the last fault, on a machine with other work; how soon they
# really are is in benchmarks/results/faults_blocks_back.json. Whatever waited for its lease's end would take 30 s.
REST_S = 10.0


class FaultMesh:
    def __init__(self, started: Mesh, stack: ExitStack) -> None:
        self.mesh = started
        self.etcd = started.etcd()
        self.metadata = started.metadata(self.etcd)
        self.etcd_links: dict[Server, TcpProxy] = {}
        self.contexts = [self._worker(f"context{n}", "CONTEXT", stack) for n in range(2)]
        self.generations = [self._worker(f"generation{n}", "GENERATION", stack) for n in range(2)]
        self.router = started.router("router", [], [], metadata=self.metadata)
        self.paused: set[Server] = set()
        self._expected: dict[tuple[str, int], Outcome] = {}
        for server in (*self.workers, self.router):
            server.wait_ready()
        self.wait_known()
        # Not at once: an engine that has just started has not said anything yet.
        self.totals = {
            worker: wait_for(f"{worker.name}'s blocks", lambda worker=worker: total(worker), REST_S)
            for worker in self.workers
        }

    def _worker(self, name: str, role: str, stack: ExitStack) -> Server:
        link = stack.enter_context(TcpProxy(self.etcd.port))
        worker = self.mesh.worker(
            name, role, metadata=self.mesh.metadata(self.etcd, port=link.port), **OPTIONS
        )
        self.etcd_links[worker] = link
        return worker

    @property
    def workers(self) -> list[Server]:
        return [*self.contexts, *self.generations]

    def pause(self, *servers: Server) -> None:
        for server in servers:
            server.pause()
            self.paused.add(server)

    def resume(self, *servers: Server) -> None:
        for server in servers:
            server.resume()
            self.paused.discard(server)

    def mend(self) -> None:
        self.resume(*self.paused)
        self.etcd.resume()
        if not self.etcd.is_running:
            self.etcd.start()
        for link in self.etcd_links.values():
            link.heal()
        dead = [server for server in (*self.workers, self.router) if server.process.poll() is not None]
        for server in dead:
            server.start()
        for server in dead:
            server.wait_ready()
        self.wait_known()

    def state(self, worker: Server, router: Server | None = None) -> str:
        """What the router says of a worker. DOWN as well when its key has ended; a place in etcd that a
        process left behind which had the same address does not count."""
        info = get(f"{(router or self.router).url}/cluster_info") or {"current_workers": {}}
        found = [worker for group in info["current_workers"].values() for worker in group]
        states = {entry["state"] for entry in found if entry["port"] == worker.port}
        return next((state for state in ("READY", "DRAINING", "STARTING") if state in states), "DOWN")

    def wait_state(
        self, worker: Server, state: str, timeout_s: float = 20.0, router: Server | None = None
    ) -> None:
        wait_for(f"{worker.name} {state}", lambda: self.state(worker, router) == state, timeout_s)

    def role(self, worker: Server) -> str:
        """What the router takes it for."""
        info = get(f"{self.router.url}/cluster_info")
        return next(
            entry["role"]
            for group in info["current_workers"].values()
            for entry in group
            if entry["port"] == worker.port and entry["state"] == "READY"
        )

    def announced(self) -> list[str]:
        """The addresses of the workers that etcd knows."""
        return [info["url"] for info in self.etcd.keys(KEYS).values()]

    def is_announced(self, worker: Server) -> bool:
        return worker.url in self.announced()

    def end_lease(self, worker: Server) -> None:
        """What etcd does when it has not heard of a worker for a while."""
        (key,) = (key for key, info in self.etcd.keys(KEYS).items() if info["url"] == worker.url)
        self.etcd.end_leases(key)

    def wait_known(self, router: Server | None = None) -> None:
        for worker in self.workers:
            self.wait_state(worker, "READY", 60.0, router)

    def wait_rest(self, *workers: Server, timeout_s: float = REST_S) -> None:
        """No block is held any more. How long that took goes to DIPTYCH_BLOCKS_BACK, a file, when it is set."""
        started = time.monotonic()
        for worker in workers or self.workers:
            if is_at_rest(worker):
                continue
            wait_for(f"{worker.name} at rest", lambda worker=worker: is_at_rest(worker), timeout_s)
            _note_back(worker, time.monotonic() - started)

    def assert_invariants(self) -> None:
        self.wait_rest()
        for worker, blocks in self.totals.items():
            wait_for(
                f"{worker.name} with {blocks:.0f} blocks",
                lambda worker=worker, blocks=blocks: total(worker) == blocks,
                REST_S,
            )
            assert "not conserved" not in worker.log.read_text(), worker.name
        assert "Traceback" not in self.router.log.read_text(), self.router.tail()
        assert get(f"{self.router.url}/health") is not None
        asyncio.run(self._assert_serving())

    async def _assert_serving(self) -> None:
        async with session() as client:
            outcome = await stream(client, self.router.url, body_of("greedy", 4))
            assert outcome.dones == 1 and not outcome.errors, outcome.errors

    async def expected(self, name: str, max_tokens: int) -> Outcome:
        """What the request brings when nothing is wrong."""
        if (name, max_tokens) not in self._expected:
            async with session() as client:
                outcome = await stream(client, self.router.url, body_of(name, max_tokens))
            assert outcome.dones == 1 and not outcome.errors, outcome.errors
            self._expected[name, max_tokens] = outcome
        return self._expected[name, max_tokens]

    async def load(
        self, *names: str, num_tokens: int, num_clients: int = 2, router: Server | None = None
    ) -> Load:
        """Requests of these kinds, to be entered."""
        expected = {name: await self.expected(name, num_tokens) for name in names}
        return Load((router or self.router).url, expected, num_tokens, num_clients=num_clients)

    async def owners(self, headers: dict[str, str], router: Server | None = None) -> tuple[Server, Server]:
        """The context and the generation worker that get requests with this session header."""
        request_id = secrets.token_hex(8)
        async with session() as client:
            url = (router or self.router).url
            outcome = await stream(
                client, url, body_of("greedy", 3), headers={**headers, "X-Request-ID": request_id}
            )
            assert outcome.dones == 1 and not outcome.errors, outcome.errors
        (context,) = [worker for worker in self.contexts if _served(worker, request_id)]
        (generation,) = [worker for worker in self.generations if _served(worker, request_id)]
        # The word that the ticket is done with comes after the answer: who is stopped before it holds the blocks.
        await asyncio.to_thread(self.wait_rest, context, generation)
        return context, generation

    async def session_of(
        self, context: Server, generation: Server, router: Server | None = None
    ) -> dict[str, str]:
        """The header of a session that these two get now: a restart changes whose it is."""
        for _ in range(40):
            headers = new_session()
            if await self.owners(headers, router) == (context, generation):
                return headers
        raise AssertionError(f"no session of {context.name} and {generation.name}")

    async def roll_workers(self) -> None:
        """Restart every worker, one after the other, as an operator would."""
        for worker in self.workers:
            worker.process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(worker.process.wait, 60) == 0
            await asyncio.to_thread(worker.start().wait_ready)
            await until(f"{worker.name} READY", lambda worker=worker: self.state(worker) == "READY")

    async def end_probation(self, headers: dict[str, str]) -> None:
        """The owners of this session take more than one leg at once again."""
        async with session() as client:
            for _ in range(7):
                outcome = await stream(client, self.router.url, body_of("greedy", 2), headers=headers)
                assert outcome.dones == 1 and not outcome.errors, outcome.errors


def _note_back(worker: Server, seconds: float) -> None:
    file = os.environ.get("DIPTYCH_BLOCKS_BACK")
    if file:
        test = os.environ["PYTEST_CURRENT_TEST"].rpartition("/")[2]
        note = {"test": test, "worker": worker.name, "seconds": round(seconds, 3)}
        with Path(file).open("ab") as notes:
            notes.write(orjson.dumps(note, option=orjson.OPT_APPEND_NEWLINE))


def new_session() -> dict[str, str]:
    """Requests with these headers go to the same workers."""
    return {"X-Session-ID": secrets.token_hex(4)}


def total(worker: Server) -> float:
    return sum(worker.blocks().values())


def is_at_rest(worker: Server) -> bool:
    blocks = worker.blocks()
    return blocks["active"] == blocks["leased"] == 0


def _served(worker: Server, request_id: str) -> bool:
    return bool(get(f"{worker.url}/perf_metrics?request_id={request_id}"))


async def roll_router(router: Server) -> None:
    """Replace the processes of a router that has several."""
    said = "takes the place of"
    before = router.log.read_text().count(said)
    router.process.send_signal(signal.SIGUSR2)
    await until("two new processes", lambda: router.log.read_text().count(said) == before + 2, 60.0)


async def until(what: str, condition, timeout_s: float = 30.0) -> None:
    """`wait_for` beside running requests."""
    await asyncio.to_thread(wait_for, what, condition, timeout_s)
