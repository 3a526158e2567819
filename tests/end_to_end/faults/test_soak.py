"""F17: random faults under load, for long: DIPTYCH_SOAK_MINUTES (30) and DIPTYCH_SOAK_SEED (1).

Never two workers of one role at a time; everything else may meet. Writes requests, faults and violations to
benchmarks/results/faults_soak.json.
"""

import asyncio
import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
from fault_clients import BODIES, assert_same, body_of, session, stream
from fault_mesh import KEYS, total, until

NUM_TOKENS = 60
NUM_CLIENTS = 4
MINUTES = float(os.environ.get("DIPTYCH_SOAK_MINUTES", "30"))
BACK_S = 120.0
SEED = int(os.environ.get("DIPTYCH_SOAK_SEED", "1"))


class Soak:
    def __init__(self, faults) -> None:
        self.faults = faults
        self.rng = random.Random(SEED)
        self.stop = asyncio.Event()
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self.longest_stall_s = 0.0
        self.urls = sorted(worker.url for worker in faults.workers)
        self.expected = {}

    async def run(self) -> None:
        self.expected = {name: await self.faults.expected(name, NUM_TOKENS) for name in BODIES}
        loop = asyncio.get_running_loop()
        loop.call_later(MINUTES * 60, self.stop.set)
        jobs = [self._clients(number) for number in range(NUM_CLIENTS)]
        jobs += [
            self._break(self.faults.contexts),
            self._break(self.faults.generations),
            self._break_registry(),
            self._watch_blocks(),
        ]
        await asyncio.gather(*jobs)

    async def _clients(self, number: int) -> None:
        rng = random.Random(SEED * 1000 + number)
        async with session() as client:
            while not self.stop.is_set():
                name = rng.choice(list(BODIES))
                leaves_at = rng.randrange(1, NUM_TOKENS) if rng.random() < 0.1 else None
                await self._request(client, name, leaves_at)

    async def _request(self, client, name: str, leaves_at: int | None) -> None:
        loop = asyncio.get_running_loop()

        def leave(number: int) -> None:
            if number == leaves_at:
                call.cancel()

        request = body_of(name, NUM_TOKENS)
        call = loop.create_task(stream(client, self.faults.router.url, request, on_event=leave))
        await asyncio.wait([call])
        if call.cancelled():
            self.counts["requests left by their client"] += 1
            return
        try:
            outcome = call.result()
            self.counts["requests"] += 1
            self.longest_stall_s = max(self.longest_stall_s, outcome.stall_s)
            assert_same(outcome, self.expected[name])
        except Exception as error:
            self.counts["requests"] += 1
            self.violations.append(f"{name}: {type(error).__name__}: {error}")

    async def _break(self, workers) -> None:
        while not self.stop.is_set():
            worker = self.rng.choice(workers)
            kind = self.rng.choice(["kill -9", "SIGSTOP", "SIGTERM", "engine killed"])
            self.counts[kind] += 1
            if kind == "SIGSTOP":
                self.faults.pause(worker)
                await asyncio.sleep(self.rng.choice([0.3, 2.0, 8.0]))
                self.faults.resume(worker)
            else:
                await self._end(worker, kind)
                await asyncio.to_thread(worker.start().wait_ready)
            await until(f"{worker.name} READY", lambda worker=worker: self._is_ready(worker), BACK_S)
            await asyncio.sleep(self.rng.uniform(0.0, 3.0))

    async def _break_registry(self) -> None:
        etcd = self.faults.etcd
        while not self.stop.is_set():
            kind = self.rng.choice(["killed", "wiped", "stopped", "leases ended", "out of reach"])
            self.counts[f"etcd {kind}"] += 1
            links = self.rng.sample([*self.faults.etcd_links.values()], 2)
            match kind:
                case "killed":
                    etcd.kill()
                case "wiped":
                    etcd.wipe()
                case "stopped":
                    etcd.pause()
                case "leases ended":
                    await asyncio.to_thread(etcd.end_leases, KEYS)
                case "out of reach":
                    for link in links:
                        link.silence()
            await asyncio.sleep(self.rng.uniform(0.0, 12.0))  # a lease lives for 5 s
            etcd.resume()
            if not etcd.is_running:
                await asyncio.to_thread(etcd.start)
            for link in links:
                link.heal()
            await until("a worker of each role in etcd", self._is_announced, BACK_S)
            await asyncio.sleep(self.rng.uniform(0.0, 6.0))

    def _is_announced(self) -> bool:
        announced = self.faults.announced()
        roles = (self.faults.contexts, self.faults.generations)
        return all(any(worker.url in announced for worker in role) for role in roles)

    async def _end(self, worker, kind: str) -> None:
        if kind == "kill -9":
            worker.kill()
        elif kind == "engine killed":
            worker.kill_engine()
        else:
            worker.process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(worker.process.wait, 60)
        if kind == "SIGTERM" and code != 0:
            self.violations.append(f"{worker.name} ended with {code} after SIGTERM")

    def _is_ready(self, worker) -> bool:
        return self.faults.state(worker) == "READY"

    async def _watch_blocks(self) -> None:
        """Whatever happens, no block is lost or owned twice."""
        while not self.stop.is_set():
            for worker, blocks in self.faults.totals.items():
                try:
                    held = await asyncio.to_thread(total, worker)
                except AssertionError:
                    continue  # it is down
                if held not in (0, blocks):  # 0: it is loading
                    self.violations.append(f"{worker.name} has {held} blocks of {blocks}")
            await asyncio.sleep(1.0)


def memory_mb(server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return round(int(status.partition("VmRSS:")[2].split()[0]) / 1024, 1)


def open_files(server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 600)
async def test_random_faults_under_load(faults, record):
    soak = Soak(faults)
    before = {"memory_mb": memory_mb(faults.router), "open_files": open_files(faults.router)}
    await soak.run()
    await asyncio.to_thread(faults.wait_rest)
    faults.mend()
    await until("every key in etcd once", lambda: sorted(faults.announced()) == soak.urls, BACK_S)
    requests = {key: soak.counts.pop(key) for key in ("requests", "requests left by their client")}
    record(
        "soak",
        minutes=MINUTES,
        seed=SEED,
        **requests,
        faults=dict(sorted(soak.counts.items())),
        streams_resumed=faults.router.metric("gen_resumed_streams_total"),
        longest_stall_s=round(soak.longest_stall_s, 2),
        router_before=before,
        router_after={"memory_mb": memory_mb(faults.router), "open_files": open_files(faults.router)},
        num_violations=len(soak.violations),
        violations=soak.violations[:20],
    )
    assert soak.violations == []
