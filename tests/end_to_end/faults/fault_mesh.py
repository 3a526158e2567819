"""One mesh for all fault tests: two context and two generation workers and a router.

A test breaks what it likes. Afterwards the mesh is mended (only what was killed is started again), and the
invariants are asserted: blocks conserved and at rest on every living worker, health truthful, requests work.
"""

import asyncio
import secrets

from fault_clients import Outcome, body_of, session, stream
from mesh import Mesh, Server, get, wait_for

# One thread each, for machines with two cores; a pool whose size does not depend on who else needs memory.
OPTIONS = {"num_threads": 1, "drain_timeout_s": 30, "kv_cache_config": {"max_tokens": 16384}}
REST_S = 2.0  # blocks are back so soon after the last request or the last fault


class FaultMesh:
    def __init__(self, started: Mesh) -> None:
        self.mesh = started
        self.contexts = [started.worker(f"context{n}", "CONTEXT", **OPTIONS) for n in range(2)]
        self.generations = [started.worker(f"generation{n}", "GENERATION", **OPTIONS) for n in range(2)]
        self.router = started.router("router", self.contexts, self.generations)
        self.paused: set[Server] = set()
        self._expected: dict[tuple[str, int], Outcome] = {}
        for server in (*self.workers, self.router):
            server.wait_ready()
        self.wait_known()
        self.totals = {worker: sum(worker.blocks().values()) for worker in self.workers}

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
        dead = [server for server in (*self.workers, self.router) if server.process.poll() is not None]
        for server in dead:
            server.start()
        for server in dead:
            server.wait_ready()
        self.wait_known()

    def states(self, router: Server | None = None) -> dict[str, str]:
        info = get(f"{(router or self.router).url}/cluster_info") or {"current_workers": {}}
        found = [worker for group in info["current_workers"].values() for worker in group]
        return {f"http://{worker['host']}:{worker['port']}": worker["state"] for worker in found}

    def wait_state(
        self, worker: Server, state: str, timeout_s: float = 20.0, router: Server | None = None
    ) -> None:
        wait_for(f"{worker.name} {state}", lambda: self.states(router).get(worker.url) == state, timeout_s)

    def wait_known(self, router: Server | None = None) -> None:
        for worker in self.workers:
            self.wait_state(worker, "READY", 60.0, router)

    def wait_rest(self, *workers: Server, timeout_s: float = REST_S) -> None:
        for worker in workers or self.workers:
            wait_for(f"{worker.name} at rest", lambda worker=worker: is_at_rest(worker), timeout_s)

    def assert_invariants(self) -> None:
        self.wait_rest()
        for worker, total in self.totals.items():
            # Not at once: an engine that has just started has not said anything yet.
            wait_for(
                f"{worker.name} with {total:.0f} blocks",
                lambda worker=worker, total=total: sum(worker.blocks().values()) == total,
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
        return context, generation

    async def end_probation(self, headers: dict[str, str]) -> None:
        """The owners of this session take more than one leg at once again."""
        async with session() as client:
            for _ in range(7):
                outcome = await stream(client, self.router.url, body_of("greedy", 2), headers=headers)
                assert outcome.dones == 1 and not outcome.errors, outcome.errors


def is_at_rest(worker: Server) -> bool:
    blocks = worker.blocks()
    return blocks["active"] == blocks["leased"] == 0


def _served(worker: Server, request_id: str) -> bool:
    return bool(get(f"{worker.url}/perf_metrics?request_id={request_id}"))


async def until(what: str, condition, timeout_s: float = 30.0) -> None:
    """`wait_for` beside running requests."""
    await asyncio.to_thread(wait_for, what, condition, timeout_s)
